"""A recipe under torchrun: two processes measure and merge what one does, and only the first one writes and speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_zipit.recipe.loading import load_recipe
from hf_zipit.running.run import run_recipe
from tests.docs_world import make_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict, Path]]:
    """The printed result and the model's folder, by the number of processes."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hf_zipit.cli", "run", "recipe.yaml", "--json", "--out", "out/2"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = replace(load_recipe("recipe.yaml"), output=folder / "out" / "1")
        alone = run_recipe(recipe)
    results = {1: json.loads(json.dumps(alone.to_dict())), 2: json.loads(done.stdout)}
    return {count: (result, folder / "out" / str(count)) for count, result in results.items()}


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
