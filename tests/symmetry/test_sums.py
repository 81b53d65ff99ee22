"""Direct sums: what is taken apart comes together again, and units merge in every part as they would alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_zipit.combine.combine import merge_tensor
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.maps.transform import to_merged, unmerge_index, unmerge_matrix
from hf_zipit.symmetry.spec import Factor, MergeSpec, Space, Sum, Symmetry, products
from hf_zipit.symmetry.sums import by_products, put_together, take_apart, without_sums

A, B, C = (Factor(name) for name in "abc")
HEADS, ROW = (Factor("heads"),), (Factor("a", dual=True),)
SPACES = {"heads": 3, "a": 4, "b": 2, "c": 5}
SPEC = MergeSpec("none", {n: Space(n, size, Symmetry.PERMUTATION) for n, size in SPACES.items()}, {})

LABELS = {
    "no sum": (*HEADS, A),
    "two terms": (Sum(((A,), (C,))),),
    "one of them twice": (Sum(((A,), (A,))),),
    "within a product": (*HEADS, Sum(((A,), (B,), (C,)))),
    "of products": (Sum(((*HEADS, A), (*HEADS, B), (C,))),),
    "as the major factor": (Sum(((A,), (B,))), C),
    "a single unit": (Sum(((), (C,))),),
    "sums of sums": (Sum(((A, Sum(((B,), (C,)))), (B,))),),
    "two sums": (Sum(((A,), (B,))), Sum((HEADS, (C,)))),
}


def alignment(experts: int) -> dict[str, SpaceMap]:
    """Groups of units, no two spaces in the same way; one of `a`'s merged units has several of every expert's."""
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for name, size in SPACES.items():
        merged = size - 1
        labels = torch.stack([torch.randperm(size, generator=generator) % merged for _ in range(experts)])
        maps[name] = SpaceMap(merged, labels)
    return maps


def numbered(label) -> torch.Tensor:
    return torch.arange(2 * SPEC.length(label)).view(2, -1).float()


@pytest.mark.parametrize("name", LABELS)
def test_what_is_taken_apart_comes_together_again(name):
    label = LABELS[name]
    x = numbered(label)
    parts = take_apart(x, 1, label, SPEC.length)
    assert [part.shape[1] for part in parts] == [SPEC.length(product) for product in products(label)]
    assert torch.equal(put_together(parts, 1, label, SPEC.length), x)
    assert torch.equal(torch.cat(parts, 1).sort().values, x)


@pytest.mark.parametrize("name", LABELS)
def test_every_part_merges_as_it_would_alone(name):
    label, maps = LABELS[name], alignment(2)
    x = torch.randn(4, SPEC.length(label), dtype=torch.float64)
    merged = to_merged(x, [ROW, label], maps, SPEC, 1)
    parts = take_apart(merged, 1, label, partial(merged_length, maps=maps, spec=SPEC))
    alone = take_apart(x, 1, label, SPEC.length)
    for part, own, product in zip(parts, alone, products(label), strict=True):
        assert torch.equal(part, to_merged(own, [ROW, product], maps, SPEC, 1))


@pytest.mark.parametrize("name", LABELS)
def test_an_index_unmerges_what_the_matrix_does(name):
    label, maps = LABELS[name], alignment(3)
    for expert in range(3):
        matrix = unmerge_matrix(maps, label, expert, SPEC)
        x = torch.randn(matrix.shape[1], dtype=torch.float64)
        assert torch.equal(x[unmerge_index(maps, label, expert, SPEC)], matrix @ x)


@pytest.mark.parametrize("name", LABELS)
def test_a_tensor_merged_with_itself_is_that_tensor(name):
    label = LABELS[name]
    x = torch.randn(4, SPEC.length(label))
    one_to_one = {name: SpaceMap(size, torch.arange(size).expand(2, size)) for name, size in SPACES.items()}
    assert torch.equal(merge_tensor([x, x], [ROW, label], one_to_one, SPEC), x)


def test_sums_on_several_axes_are_all_taken_apart():
    axes = (LABELS["two terms"], LABELS["within a product"])
    x = torch.arange(9 * 33).view(9, 33)
    seen = []
    same = by_products(x, axes, lambda part, labels: seen.append((part.shape, labels)) or part, SPEC.length)
    assert torch.equal(same, x)
    assert [labels for _, labels in seen] == [(a, b) for a in products(axes[0]) for b in products(axes[1])]
    assert all(list(shape) == list(map(SPEC.length, labels)) for shape, labels in seen)


def test_a_spec_without_sums_has_a_tensor_for_every_part():
    axes = {"plain.weight": (ROW,), "fused.weight": (LABELS["two terms"], LABELS["within a product"])}
    spec = MergeSpec("none", SPEC.spaces, axes)
    weights = [{"plain.weight": torch.ones(4), "fused.weight": torch.randn(9, 33), "unread": torch.ones(1)}, {}]
    apart, (own, other) = without_sums(spec, weights)
    assert other == {}
    assert set(own) == {"plain.weight", "unread", *(f"fused.weight[{i}][{j}]" for i in range(2) for j in range(3))}
    assert apart.axes.keys() == own.keys() - {"unread"}
    assert all(list(own[name].shape) == list(map(SPEC.length, labels)) for name, labels in apart.axes.items())
    rows = weights[0]["fused.weight"][4:]
    assert torch.equal(own["fused.weight[1][0]"], rows.view(5, 3, 11)[..., :4].reshape(5, 12))
