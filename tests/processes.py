"""Everything that is tested in two processes, in one launch of them: to start is what takes long.

A worker is a module with `work(accelerator, folder)`, which every process calls, and perhaps `prepare(folder)`, called
before. Where the launch of all fails, each has another of its own: only the tests of what is broken fail.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

WORKERS = [f"tests.{room}.worker" for room in ("observation", "correct", "refit", "running")]
"""The last one runs a command, which ends what processes share."""


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder that a worker was called with, in two processes; all test processes share one launch."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(worker: str) -> Path:
        with (root / "two_processes.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            told = root / f"{worker}.txt"
            if not told.exists():
                together = launched(root, WORKERS)
                for each in WORKERS:
                    (root / f"{each}.txt").write_text(together and launched(root, [each]))
        assert not told.read_text(), told.read_text()
        return root / worker

    return folder


def launched(root: Path, workers: list[str]) -> str:
    """What went wrong; workers get folders of their names."""
    for worker in workers:
        shutil.rmtree(root / worker, ignore_errors=True)
        (root / worker).mkdir()
        getattr(import_module(worker), "prepare", lambda _: None)(root / worker)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    here = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.processes", str(root), *workers],
        cwd=here, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.stderr[-3000:] if done.returncode else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name in sys.argv[2:]:
        import_module(name).work(accelerator, Path(sys.argv[1], name))
        accelerator.wait_for_everyone()
    accelerator.end_training()  # without it gloo's threads may abort the process at exit
