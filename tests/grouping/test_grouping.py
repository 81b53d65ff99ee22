"""Groups of experts: the division is the best there is, and what it goes by is what merges of two lose."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional

from hf_zipit import group, merge
from hf_zipit.data.calibration import Calibration
from hf_zipit.data.held_out import divide, held_out
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.evaluation.losses import losses
from hf_zipit.grouping.grouping import Grouping
from hf_zipit.grouping.partition import best_partition
from hf_zipit.report.grouping import disturbance, grouping_table
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from tests import tiny
from tests.cli.conftest import call
from tests.test_invariants import with_tensors

__all__ = ["call"]  # a fixture

SETTINGS = {"method": "permute", "refit": None}


@cache
def experts() -> dict[str, Any]:
    """Three, the last of which is the first with its units in another order."""
    generator = torch.Generator().manual_seed(2)
    models = tiny.pair("vit", (0, 1), (3, 3))  # fresh ones have a head that hardly answers
    first, second = (with_tensors(model, perturb(model_tensors(model), generator)) for model in models)
    spec = MergeSpec.from_model(first)
    moved = apply_element(model_tensors(first), spec, random_element(spec, torch.Generator().manual_seed(0), True))
    return {"one": first, "other": second, "again": with_tensors(first, moved)}


def images(samples: int = 24) -> torch.Tensor:
    return torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@cache
def found() -> Grouping:
    return group(experts(), images(), **SETTINGS)


@pytest.mark.parametrize("count, groups", [(3, 2), (5, 1), (5, 3), (6, 4), (6, 6)])
def test_the_division_is_the_cheapest_of_all(count, groups):
    generator = torch.Generator().manual_seed(count + groups)
    costs = torch.randn(count, count, generator=generator).tolist()

    def cost(where):
        return sum(costs[i][j] for i, j in product(range(count), repeat=2) if i != j and where[i] == where[j])

    divisions = [where for where in product(range(groups), repeat=count) if len(set(where)) == groups]
    best = best_partition(costs, groups)
    assert sorted(member for members in best for member in members) == list(range(count)) and len(best) == groups
    assert best == sorted(sorted(members) for members in best)
    where = [next(n for n, members in enumerate(best) if i in members) for i in range(count)]
    assert cost(where) == pytest.approx(min(map(cost, divisions)), abs=1e-9)


def test_copies_do_not_disturb_each_other_and_are_kept_together():
    assert found().groups == (("one", "again"), ("other",))
    assert abs(found().loses["one"]["again"]) < 1e-3 < found().loses["one"]["other"]
    assert found().errs["again"]["one"] == 0
    assert found().expected("other") == 0 and found().expected("one") == found().loses["one"]["again"]


def test_what_a_task_loses_is_measured_on_samples_that_the_merge_has_not_read():
    data, rest = divide(Calibration.of(images()).read(experts()), 0.25)
    held = held_out(rest, experts())
    two = {task: experts()[task] for task in ("one", "other")}
    merged = merge(two, data.whole(None)["pixel_values"], **SETTINGS)
    labels, pixels = held.tasks["one"].tensors["labels"], held.tasks["one"].tensors["pixel_values"]
    with torch.no_grad():
        outs = [m.logits for m in (merged(pixel_values=pixels, task="one"), two["one"](pixel_values=pixels))]
    after, before = (float(functional.cross_entropy(logits, labels)) for logits in outs)
    assert found().samples == dict.fromkeys(experts(), 6) and found().answers == "experts"
    assert found().loses["one"]["other"] == pytest.approx(after - before, abs=1e-5)


def test_another_number_of_groups_needs_no_other_merges(monkeypatch):
    monkeypatch.setattr("hf_zipit.grouping.grouping.merge", None)
    assert found().divided(1).groups == (("one", "other", "again"),)
    assert found().divided(3).groups == (("one",), ("other",), ("again",))
    told = found().divided(1)
    assert told.expected("one") == pytest.approx(sum(told.loses["one"].values()))
    for groups in (0, 4):
        with pytest.raises(RecipeError, match="groups"):
            found().divided(groups)


def test_the_losses_of_a_decoder_are_those_of_the_next_token():
    models = dict(zip(("a", "b"), tiny.pair("gpt2"), strict=True))
    ids = torch.randint(0, 50, (6, 8), generator=torch.Generator().manual_seed(0))
    held = held_out(Calibration.of({"a": {"input_ids": ids}, "b": {"input_ids": ids}}).read(models), models)
    measured = losses(models, held)
    assert all(wrong == 0 for _, wrong in measured.values())  # the experts' own answers are right
    merged = merge(models, depth=0.0)
    for task, found in losses(merged, held).items():
        assert found == pytest.approx(measured[task], abs=1e-4)


def test_wrong_settings_are_told_before_anything_is_merged(monkeypatch):
    monkeypatch.setattr("hf_zipit.grouping.grouping.merge", None)
    with pytest.raises(RecipeError, match="3 to 12 experts, and there are 2"):
        group({task: experts()[task] for task in ("one", "other")}, images())
    with pytest.raises(RecipeError, match="groups is 4"):
        group(experts(), images(), groups=4)
    with pytest.raises(DataError, match="hold some out"):
        group(experts(), images(1), **SETTINGS)


def test_the_command_line_says_it_and_draws_it(tmp_path, call):
    for task, model in experts().items():
        model.save_pretrained(tmp_path / task)
    pixels = [image.tolist() for image in images(32)]
    Dataset.from_dict({"pixel_values": pixels}).save_to_disk(str(tmp_path / "data"))
    given = ["group", *(tmp_path / task for task in experts()), "-c", tmp_path / "data", "-m", "permute", "--no-refit"]
    code, out, err = call(*given, "--plot", tmp_path / "groups.png", "--json")
    assert code == 0 and json.loads(out)["groups"] == [["one", "again"], ["other"]], err
    assert (tmp_path / "groups.png").stat().st_size > 5000
    assert call(*given, "-g", 5)[0] == 1 and call(*given[:3], *given[4:])[0] == 1
    shown = grouping_table(found())
    assert shown.row_count == 3 and disturbance(found()).axes
