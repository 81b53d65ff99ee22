"""Which statistics a merged unit is given: averages over its units of means and deviations, dead units excepted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_zipit.correct.rescale_shift import to_own_average
from hf_zipit.correct.sites import Site
from hf_zipit.correct.statistics import LARGEST, Statistics, shared_statistics, towards
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.symmetry.spec import Factor, MergeSpec, Space, Symmetry

SPEC = MergeSpec("Toy", {"units": Space("units", 3, Symmetry.PERMUTATION)}, {"weight": ((Factor("units"),),)})
SITE = Site("layer", "output", 0, (Factor("units"),))
# The first merged unit holds two units of expert a and one of b, the second one of a, the third two of b.
MAPS = {"units": SpaceMap(3, torch.tensor([[0, 0, 1], [0, 2, 2]]))}


def statistics(mean: list[float], std: list[float]) -> Statistics:
    return Statistics(torch.tensor(mean).double(), torch.tensor(std).double())


A = statistics([1.0, 3.0, 5.0], [1.0, 2.0, 4.0])
B = statistics([5.0, 2.0, 4.0], [6.0, 1.0, 3.0])


def test_a_merged_unit_has_the_mean_of_its_units_deviations_not_of_their_variances() -> None:
    found = shared_statistics([A, B], SITE, MAPS, SPEC)
    assert found.mean.tolist() == pytest.approx([3.0, 5.0, 3.0])
    assert found.std.tolist() == pytest.approx([3.0, 4.0, 2.0])


@pytest.mark.parametrize(("number", "own", "expected"), [(0, A, [2.0, 5.0, None]), (1, B, [5.0, None, 3.0])])
def test_a_task_is_corrected_towards_the_average_of_its_own_units(
    number: int, own: Statistics, expected: list[float | None]
) -> None:
    """Whatever share of the merged unit they are; where it holds none of them there is no target."""
    found, held = to_own_average(own, SITE, MAPS, SimpleNamespace(spec=SPEC), number)
    assert held.tolist() == [value is not None for value in expected]
    assert found.mean[held].tolist() == pytest.approx([value for value in expected if value is not None])


def test_a_unit_that_died_in_the_merge_gets_the_mean_and_keeps_its_deviation() -> None:
    target = statistics([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    found = statistics([0.5, 0.5, 0.5], [0.0, 0.5 / LARGEST, 0.5])
    scale, shift = towards(target, found, 1e-5)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert float(scale[2]) == pytest.approx(2.0, rel=1e-3)
    assert (scale * found.mean + shift).tolist() == pytest.approx([2.0] * 3)


def test_right_statistics_are_left_alone() -> None:
    scale, shift = towards(A, A, 1e-5)
    assert scale.tolist() == [1.0] * 3 and shift.abs().max() < 1e-12
