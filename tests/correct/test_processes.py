"""Several processes correct a model together: each ends up with the same tensors, and uses every sample once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.correct.worker import corrected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, root = tmp_path_factory.mktemp("processes"), Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "-m", "tests.correct.worker", str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_give_the_model_of_one(folder: Path):
    one, two = (load_file(folder / f"{rank}.safetensors") for rank in (0, 1))
    alone = corrected(Accelerator(cpu=True))
    assert one.keys() == two.keys() == alone.keys()
    assert any(name.startswith("rescales.") for name in alone)
    for name, tensor in alone.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
