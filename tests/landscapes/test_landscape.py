"""The landscape: its points are the experts and the merge, its axes are orthogonal, its barriers are what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_zipit import MergeConfig, landscape, merge
from hf_zipit.data.held_out import HeldOut
from hf_zipit.errors import ExpertError, RecipeError
from hf_zipit.evaluation.losses import losses
from hf_zipit.landscapes.results import barrier
from hf_zipit.landscapes.surface import Surface
from hf_zipit.landscapes.survey import Survey, grid_lines
from hf_zipit.registry import METHODS
from hf_zipit.report.landscape import barriers_table, contours, interpolation, save_landscape
from hf_zipit.running.exploring import landscape_recipe
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from tests import tiny
from tests.searching.test_search import recipe
from tests.test_invariants import with_tensors

TASKS = ("few", "more")
EXACT = ["identity", "weights", "permute"]
INEXACT = ["zip", "partial"]
"""Methods that join units, or keep some apart."""


@cache
def experts(name: str = "vit", seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Models in general position: fresh ones have a head that hardly answers."""
    generator = torch.Generator().manual_seed(2)
    models = tiny.pair(name, seeds, range(3, 3 + len(seeds)))
    models = [with_tensors(model, perturb(model_tensors(model), generator)) for model in models]
    return dict(zip((*TASKS, "third"), models, strict=False))


@cache
def data(name: str = "vit") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = 16 if name == "vit" else 32
    return {task: torch.randn(16, 3, size, size, generator=generator) for task in (*TASKS, "third")}


def survey(name: str = "vit", models: Mapping[str, Any] | None = None) -> Survey:
    models = models or experts(name)
    return Survey.of(models, {task: data(name)[task] for task in models}, hold_out=0.5)


def own_losses(models: Mapping[str, Any], held: HeldOut) -> dict[str, float]:
    """Every expert's loss on its own task, without any merged model."""
    found = {}
    for task, columns in held.tasks.items():
        inputs = dict(columns.tensors)
        labels = inputs.pop("labels")
        with torch.no_grad():
            found[task] = float(F.cross_entropy(models[task](**inputs).logits, labels))
    return found


def test_a_barrier_is_the_excess_over_the_line_between_the_ends():
    at = [i / 10 for i in range(11)]
    assert barrier(at, [3 - 2 * x for x in at]) == pytest.approx(0)
    assert barrier(at, [1 + x + 4 * x * (1 - x) for x in at]) == pytest.approx(1)
    assert barrier(at, [x * x for x in at]) == 0  # below the line: only the ends are not


@pytest.mark.parametrize("method", EXACT)
def test_the_ends_of_the_line_are_the_experts_and_its_middle_is_the_merge(method):
    it = survey()
    curve = it.curve(it.surface(TASKS, MergeConfig(method=method)), 5)
    expected = own_losses(experts(), it.held)
    assert curve.exact
    assert curve.loss["few"][0] == pytest.approx(expected["few"], abs=1e-5)
    assert curve.loss["more"][-1] == pytest.approx(expected["more"], abs=1e-5)
    assert abs(curve.loss["few"][-1] - expected["few"]) > 1e-2  # the other expert's trunk is another
    merged = losses(merge(experts(), it.calibration, method=method), it.held)
    for task in TASKS:
        assert (curve.loss[task][2], curve.error[task][2]) == pytest.approx(merged[task], abs=1e-5)
        assert curve.barrier(task) >= 0


def inner(surface: Surface, one: str, other: str) -> float:
    """The inner product of two of a surface's axes."""
    return sum(float((getattr(p, one).double() * getattr(p, other).double()).sum()) for p in surface.moves)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "permute"},
        {"method": "permute", "depth": 0.5},
        {"method": "zip"},
        {"method": "zip", "refit": True},
        {"method": "permute", "refit": True, "depth": 0.5},
    ],
)
def test_the_axes_are_orthogonal_and_the_merge_is_in_the_plane(settings):
    it = survey()
    surface = it.surface(TASKS, MergeConfig(**settings))
    before = losses(surface.model, it.held)
    assert inner(surface, "east", "north") == pytest.approx(0, abs=1e-4 * inner(surface, "east", "east"))
    assert inner(surface, "north", "north") == pytest.approx(inner(surface, "east", "east"), rel=1e-4)
    assert surface.through_merge == bool(settings.get("refit"))
    if not surface.through_merge:
        assert surface.points["merge"] == pytest.approx((0.5, 0.0), abs=1e-4)
    elsewhere = losses(surface.move(0.3, -0.4), it.held)
    back = losses(surface.move(*surface.points["merge"]), it.held)
    for task in TASKS:
        assert abs(elsewhere[task][0] - before[task][0]) > 1e-3
        assert back[task] == pytest.approx(before[task], abs=2e-5)


def test_the_experts_and_the_merge_lie_on_lines_of_the_grid():
    it = survey()
    surface = it.surface(TASKS, MergeConfig(method="zip", refit=True))
    plane = it.plane(surface, 7, 0.35)
    even = it.plane(surface, 2, 0.35)
    assert (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1]) == (even.x[0], even.x[-1], even.y[0], even.y[-1])
    assert list(plane.x) == sorted(plane.x) and list(plane.y) == sorted(plane.y)
    for x, y in surface.points.values():
        at = losses(surface.move(x, y), it.held)
        for task in TASKS:
            assert plane.loss[task][plane.y.index(y)][plane.x.index(x)] == pytest.approx(at[task][0], abs=1e-5)


def test_marks_that_are_close_keep_a_line_each():
    lines = grid_lines((0.0, 1.0, 0.5, 0.48), 0.85, 9)
    assert len(set(lines)) == 9 and lines == sorted(lines) and {0.0, 0.48, 0.5, 1.0} <= set(lines)
    assert len(grid_lines((0.0, 0.5, 1.0), 0.85, 3)) == 3


def test_fitted_doors_belong_to_the_merge_and_not_to_the_experts():
    it = survey()
    surface = it.surface(TASKS, MergeConfig(method="permute", refit=True))
    expected = own_losses(experts(), it.held)
    assert losses(surface.move(0.0), it.held)["few"][0] == pytest.approx(expected["few"], abs=1e-5)
    assert losses(surface.move(1.0), it.held)["more"][0] == pytest.approx(expected["more"], abs=1e-5)


def test_units_that_were_joined_make_the_ends_inexact():
    it = survey()
    assert it.surface(TASKS, MergeConfig(method="permute")).exact
    assert not it.surface(TASKS, MergeConfig(method="zip", options={"beta": 1.0})).exact


@pytest.mark.parametrize(
    "method", [m for m in METHODS.names() if METHODS.get(m).needs and m not in ("zip", "partial")]
)
def test_alignment_removes_the_barrier_between_reordered_copies(method):
    """A copy with reordered units and a little noise: alignment finds the same basin again."""
    model = experts()["few"]
    generator = torch.Generator().manual_seed(5)
    spec = MergeSpec.from_model(model)
    element = random_element(spec, generator, True)
    moved = with_tensors(model, apply_element(model_tensors(model), spec, element))
    noisy = {
        name: tensor + 1e-4 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in model_tensors(moved).items()
    }
    pair = {"few": model, "more": with_tensors(moved, noisy)}
    it = survey(models=pair)
    aligned = it.curve(it.surface(TASKS, MergeConfig(method=method)), 5)
    naive = it.curve(it.surface(TASKS, MergeConfig(method="identity")), 5)
    assert max(aligned.barrier(task) for task in TASKS) < 1e-3
    assert min(naive.barrier(task) for task in TASKS) > 0.05


def test_equal_trunks_have_no_line_between_them():
    model = experts()["few"]
    with pytest.raises(ExpertError, match="the same"):
        survey(models={"few": model, "more": model}).surface(TASKS, MergeConfig(method="identity"))


def test_only_the_trunk_moves():
    it = survey()
    surface = it.surface(TASKS, MergeConfig(method="permute", depth=0.5))
    branches = {name: tensor.clone() for name, tensor in model_tensors(surface.model.branches).items()}
    held = [tensor for move in surface.moves for tensor in move.targets]
    surface.move(0.2, 0.7)
    shared = {tensor.data_ptr() for tensor in held}
    for name, tensor in model_tensors(surface.model.branches).items():
        if tensor.data_ptr() not in shared:
            assert torch.equal(tensor, branches[name]), name


def test_statistics_stay_positive_far_away():
    models = experts("resnet-basic")
    found = landscape(
        models, {task: data("resnet-basic")[task] for task in models}, method="identity", grid=3, margin=3.0, steps=3,
        hold_out=0.5,
    )  # fmt: skip
    values = [value for rows in found.plane.loss.values() for row in rows for value in row]
    assert all(math.isfinite(value) for value in values)


def test_a_third_expert_makes_the_merge_span_the_plane():
    models = experts(seeds=(0, 1, 2))
    found = landscape(models, data(), method="identity", pair=("more", "third"), grid=2, steps=3, hold_out=0.5)
    assert found.pair == ("more", "third") and found.naive is None
    assert found.plane.through_merge and found.plane.points["merge"][1] > 0.1
    assert list(found.plane.loss) == ["few", "more", "third"]


def test_what_cannot_be_drawn_is_told():
    it = survey()
    with pytest.raises(RecipeError, match="nothing is shared"):
        it.surface(TASKS, MergeConfig(method="identity", depth=0))
    for wrong in ({"steps": 2}, {"grid": 1}, {"samples": 0}, {"pair": ("few", "few")}, {"pair": ("few", "mor")}):
        with pytest.raises(RecipeError):
            landscape(experts(), data_of(TASKS), method="identity", **wrong)


def data_of(tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {task: data()[task] for task in tasks}


def test_the_same_seed_measures_the_same_and_the_samples_are_limited():
    settings = {"method": "weights", "grid": 3, "steps": 3, "samples": 3, "hold_out": 0.5}
    one = landscape(experts(), data_of(TASKS), **settings)
    assert one.samples == {"few": 3, "more": 3}
    assert one.to_dict() == landscape(experts(), data_of(TASKS), **settings).to_dict()
    assert one.to_dict() != landscape(experts(), data_of(TASKS), **{**settings, "seed": 1}).to_dict()


def test_what_is_saved_can_be_read_and_drawn(tmp_path):
    found = landscape(experts(), data_of(TASKS), method="zip", refit=True, grid=3, steps=3, hold_out=0.5)
    save_landscape(found, tmp_path, title="tiny")
    assert {"landscape.json", "landscape.png", "interpolation.png"} == {path.name for path in tmp_path.iterdir()}
    read = json.loads((tmp_path / "landscape.json").read_text())
    assert read["method"] == "zip+refit"
    assert read["plane"]["loss"]["few"] == [list(row) for row in found.plane.loss["few"]]
    assert [curve["method"] for curve in read["interpolation"]] == ["zip", "identity"]
    panels = [axis.get_title(loc="left") for axis in contours(found).axes]
    assert [title for title in panels if title] == ["loss of 'few'", "loss of 'more'"]
    assert len(interpolation(found).axes) == 4
    assert barriers_table(found).row_count == 2


def test_a_recipe_is_measured_on_calibration_data_alone(tmp_path):
    given = recipe(tmp_path, method="average", depth=1, evaluation=None)
    found = landscape_recipe(given, grid=2, steps=3, samples=4)
    assert found.answers == "labels"
    assert found.samples == {"few": 4, "more": 4}
