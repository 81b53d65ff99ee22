"""Two processes, each with half of the micro-batches, refit as one does with all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .worker import NAMES, refitted


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, root = tmp_path_factory.mktemp("processes"), Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "-m", "tests.refit.worker", str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_refit_as_one(two_processes: Path, name: str):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = refitted(name, None)
    finally:
        torch.set_num_threads(threads)
    for rank in (0, 1):
        found = load_file(two_processes / f"{name}-{rank}.safetensors")
        errors = found.pop("errors")
        torch.testing.assert_close(errors, torch.tensor(single.config.method["refit_errors"]["errors"]))
        assert found.keys() == single.state_dict().keys()
        for key, tensor in single.state_dict().items():
            difference = (found[key] - tensor).double().abs().max()
            assert difference <= 1e-6 * tensor.double().abs().max(), f"{key}: {difference:.1e}"
