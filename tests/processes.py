"""Running a test's worker in two processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(worker: str, folder: Path, timeout: float = 300) -> None:
    """Start the module `worker` twice under torchrun (gloo, CPU) with `folder` as its argument; it must succeed."""
    root = Path(__file__).parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "-m", worker, str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
