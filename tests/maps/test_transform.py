"""The maps applied to tensors, against dense merge and unmerge matrices, and exactly where nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_zipit.combine.combine import merge_tensor
from hf_zipit.errors import SpecError
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.maps.transform import to_merged, unmerge_index
from hf_zipit.symmetry.spec import AxisLabel, Factor, product_key
from tests.align.toys import space, spec_of

SPEC = spec_of(
    space("stream", 6),
    space("hidden", 5),
    space("heads", 3),
    space("dim", 4, "heads"),
    space("classes", 2, fixed=True),
    space("rotary", 2, fixed=True),
)


def label(text: str) -> AxisLabel:
    """`"heads dim"`: a product of spaces; a minus before one that the axis reads."""
    return tuple(Factor(name.lstrip("-"), name.startswith("-")) for name in text.split())


def random_alignment(experts: int, seed: int = 0) -> dict[str, SpaceMap]:
    """Random groupings without empty groups; heads one-to-one, as always."""
    generator = torch.Generator().manual_seed(seed)

    def grouping(units: int, size: int) -> Tensor:
        flat = torch.cat([torch.arange(size), torch.randint(size, (experts * units - size,), generator=generator)])
        return flat[torch.randperm(len(flat), generator=generator)].reshape(experts, units)

    heads = torch.stack([torch.randperm(3, generator=generator) for _ in range(experts)])
    return {
        "stream": SpaceMap(7, grouping(6, 7)),
        "hidden": SpaceMap(4, grouping(5, 4)),
        "heads": SpaceMap(3, heads),
        "dim": SpaceMap(5, torch.stack([grouping(4, 5) for _ in range(3)], dim=1)),
    }


def one_to_one(experts: int, seed: int = 0) -> dict[str, SpaceMap]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stream": (6,), "hidden": (5,), "heads": (3,), "dim": (3, 4)}
    return {
        name: SpaceMap(shape[-1], torch.rand(experts, *shape, generator=generator).argsort(-1))
        for name, shape in shapes.items()
    }


def dense(text: str, alignment: dict[str, SpaceMap], expert: int) -> Tensor:
    """T M_t `[k, d]` of a vector axis, U_t^T `[k, d]` of a dual axis, written out unit by unit."""
    names, duals = [n.lstrip("-") for n in text.split()], [n.startswith("-") for n in text.split()]
    if names == ["heads", "dim"]:
        heads, dims = alignment["heads"], alignment["dim"]
        found = torch.zeros(heads.size * dims.size, 3 * 4, dtype=torch.float64)
        for h in range(3):
            merged = heads.labels[expert, h]
            for i in range(4):
                g = dims.labels[expert, merged, i]
                group = (dims.labels[:, merged] == g).sum()
                found[merged * dims.size + g, h * 4 + i] = 1.0 if duals[1] else heads.experts / group
        return found
    if names[0] not in alignment:
        return torch.eye(SPEC.size(tuple(names)), dtype=torch.float64)
    space_map = alignment[names[0]]
    found = torch.nn.functional.one_hot(space_map.labels[expert], space_map.size).T.double()
    if not duals[0]:
        found = found * space_map.experts / space_map.counts()[:, None]
    if len(names) > 1:  # hidden x rotary: a movable and a fixed factor
        found = torch.kron(found.contiguous(), torch.eye(2, dtype=torch.float64))
    return found


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize(
    "axes",
    [
        ("hidden",),
        ("hidden", "-stream"),
        ("classes", "-stream"),
        ("heads dim", "-stream"),
        ("stream", "-heads -dim"),
        ("hidden rotary", "-stream"),
        ("stream", "-hidden -rotary"),
        ("hidden", "-stream", "classes"),
    ],
)
def test_the_sum_of_m_w_u_with_dense_matrices(axes, experts):
    alignment = random_alignment(experts)
    labels = [label(text) for text in axes]
    shape = [SPEC.size(product_key(axis)) for axis in labels]
    tensors = torch.randn(experts, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = 0
    for expert, tensor in enumerate(tensors):
        for axis, text in enumerate(axes):
            tensor = torch.tensordot(dense(text, alignment, expert), tensor, dims=([1], [axis])).movedim(0, axis)
        expected = expected + tensor / experts
    torch.testing.assert_close(merge_tensor(list(tensors), labels, alignment, SPEC), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_one_to_one_maps_of_permuted_copies_give_the_same_bits(experts):
    alignment = one_to_one(experts)
    axes = [label("heads dim"), label("-stream")]
    merged = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)) * 1e3
    copies = [
        merged[unmerge_index(alignment, ("heads", "dim"), t, SPEC)][:, unmerge_index(alignment, ("stream",), t, SPEC)]
        for t in range(experts)
    ]
    assert all(torch.equal(to_merged(copy, axes, alignment, SPEC, t), merged) for t, copy in enumerate(copies))
    result = merge_tensor(copies, axes, alignment, SPEC)
    assert result.dtype == torch.float32
    assert torch.equal(result, merged)


def test_a_merged_layer_computes_the_merge_of_what_the_experts_compute():
    """With inputs that the unmerge explains, M y of the experts is what the merged weights give."""
    alignment = random_alignment(2)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, generator=generator, dtype=torch.float64)
    weights = [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    outputs = [w @ x[unmerge_index(alignment, ("stream",), t, SPEC)] for t, w in enumerate(weights)]
    merged = merge_tensor(weights, [label("heads dim"), label("-stream")], alignment, SPEC)
    torch.testing.assert_close(merged @ x, merge_tensor(outputs, [label("heads dim")], alignment, SPEC))


def test_dtypes_are_kept():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(5).to(dtype)
        assert torch.equal(merge_tensor([x, x], [label("hidden")], one_to_one(1) | _twice(), SPEC), x)


def _twice() -> dict[str, SpaceMap]:
    return {"hidden": SpaceMap(5, torch.arange(5).repeat(2, 1))}


def test_integers_are_agreed_upon_and_not_averaged():
    ids = torch.arange(2)
    assert torch.equal(merge_tensor([ids, ids], [label("classes")], _twice(), SPEC), ids)
    assert merge_tensor([torch.tensor(3), torch.tensor(5)], [], _twice(), SPEC) == 5
    with pytest.raises(SpecError, match="different values"):
        merge_tensor([ids, ids + 1], [label("classes")], _twice(), SPEC)
    with pytest.raises(SpecError, match="movable"):
        merge_tensor([torch.arange(5)] * 2, [label("hidden")], _twice(), SPEC)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(SpecError, match=r"\[4\] where the spec expects \[5\]"):
        merge_tensor([torch.zeros(5), torch.zeros(4)], [label("hidden")], _twice(), SPEC)
