"""Axes taken apart into their factors, and maps compared."""

from __future__ import annotations

import torch

from hf_zipit.maps.products import factors_first
from hf_zipit.maps.space_map import LinearMap, SpaceMap
from hf_zipit.maps.transform import to_merged
from hf_zipit.symmetry.spec import Factor
from tests.align.toys import space, spec_of

SPEC = spec_of(space("heads", 2), space("value", 3, "heads"), space("stream", 4))
LABELS = ((Factor("stream"),), (Factor("heads", dual=True), Factor("value", dual=True)), ())


def test_factors_are_moved_first_and_the_rest_is_flattened():
    x = torch.arange(4 * 6 * 5).reshape(4, 6, 5)
    found = factors_first(x, LABELS, ["heads", "value"], SPEC, {})
    assert torch.equal(found, x.reshape(4, 2, 3, 5).permute(1, 2, 0, 3).reshape(2, 3, -1))
    assert torch.equal(factors_first(x, LABELS, [], SPEC, {}), x.flatten())


def test_of_a_space_on_two_axes_either_can_be_first():
    labels = ((Factor("stream"),), (Factor("stream", dual=True),))
    x = torch.randn(4, 4)
    assert torch.equal(factors_first(x, labels, ["stream"], SPEC, {}, 0), x)
    assert torch.equal(factors_first(x, labels, ["stream"], SPEC, {}, 1), x.T)


def test_an_axis_without_a_label_may_have_any_length():
    maps = {"stream": SpaceMap(4, torch.tensor([[1, 0, 2, 3], [0, 1, 2, 3]]))}
    x = torch.randn(4, 6, 5)
    assert torch.equal(to_merged(x, LABELS, maps, SPEC, 0), x[[1, 0, 2, 3]])


def test_maps_are_equal_when_they_do_the_same():
    identity = SpaceMap.identity(3, 2, (2,))
    assert identity.labels.shape == (2, 2, 3)
    assert identity.equals(SpaceMap(3, torch.arange(3).expand(2, 2, 3)))
    assert not identity.equals(SpaceMap(3, identity.labels.flip(-1)))
    rotated = LinearMap.rotation(torch.eye(3).expand(2, 3, 3))
    assert rotated.equals(LinearMap.of(torch.eye(3).expand(2, 3, 3)))
    assert not identity.equals(rotated)
