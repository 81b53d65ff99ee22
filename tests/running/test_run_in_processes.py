"""A recipe under torchrun: two processes measure and merge what one does, and only the first one writes and speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.docs_world import make_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict, Path]]:
    """The printed result and the model's folder, by the number of processes."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = {}
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)] if count > 1 else []
        command = [sys.executable, *launcher, "-m", "hf_zipit.cli", "run", "recipe.yaml", "--json"]
        done = subprocess.run(
            [*command, "--out", f"out/{count}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[count] = json.loads(done.stdout), folder / "out" / str(count)
    return found


def test_two_processes_measure_what_one_does(runs) -> None:
    (one, _), (two, _) = runs[1], runs[2]
    assert two["experts"] == one["experts"]
    assert [row["accuracy"] for row in two["results"]] == [row["accuracy"] for row in one["results"]]


def test_two_processes_write_what_one_does(runs) -> None:
    one, two = (load_file(folder / "model" / "model.safetensors") for _, folder in runs.values())
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for _, folder in runs.values()]
    assert files[0] == files[1]
