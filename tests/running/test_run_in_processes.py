"""A recipe under torchrun: two processes measure and merge what one does, and only the first one writes and speaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_zipit.recipe.loading import load_recipe
from hf_zipit.running.run import run_recipe


@pytest.fixture(scope="module")
def runs(in_two_processes: Callable[[str], Path]) -> dict[int, tuple[dict, Path]]:
    """The printed result and the model's folder, by the number of processes."""
    folder = in_two_processes("tests.running.worker")
    first, second = ((folder / f"printed{rank}").read_text() for rank in (0, 1))
    assert not second
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = replace(load_recipe("recipe.yaml"), output=folder / "out" / "1")
        alone = run_recipe(recipe)
    results = {1: json.loads(json.dumps(alone.to_dict())), 2: json.loads(first)}
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
