"""Every kind of op, in modules written by hand: what is inferred is right, proves, and is all that is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hf_zipit.errors import SpecError
from hf_zipit.symmetry import MergeSpec, prove
from hf_zipit.symmetry.proof import TOLERANCE
from hf_zipit.symmetry.spaces import flipped
from hf_zipit.symmetry.spec import Symmetry, product_key, products
from tests.symmetry.by_hand import (
    CASES,
    FIXED,
    GROUPS,
    HEAD_DIM,
    HEADS,
    LINEAR,
    MIXING,
    ONES,
    ORTHOGONAL,
    PERMUTATION,
    UNKNOWN,
    WHOLE,
    Attention,
    Between,
    Case,
    Convolutional,
    Fused,
    Gated,
    HeadMixing,
    ResidualStream,
    Routed,
    TwoCuts,
    Windows,
    rotary_cut_after,
    rotary_cut_before,
    scaled_and_rotated_by_head,
)
from tests.symmetry.checks import BROKEN, next_symmetries, spaces_of, with_symmetry, worst_error
from tests.tiny import mostly_seldom


def seeded(builder, shape):
    """A module, its spec and its inputs."""
    torch.manual_seed(0)
    model = builder()
    inputs = {"x": torch.randn(shape)}
    return model, MergeSpec.from_model(model, inputs), inputs


@pytest.mark.parametrize("name", mostly_seldom(CASES, 2))
def test_hidden_units_get_the_symmetry_that_the_op_leaves(name):
    case = CASES[name]
    model, spec, inputs = seeded(lambda: Between(case), (2, 5, 6))
    hidden = spaces_of(spec, "first.weight", 0)
    expected = case.symmetry if isinstance(case.symmetry, tuple) else (case.symmetry,) * len(hidden)
    assert tuple(space.symmetry for space in hidden) == expected
    assert worst_error(model, spec, inputs) <= TOLERANCE
    for space in hidden if case.tight else ():
        for more in next_symmetries(space):
            assert worst_error(model, with_symmetry(spec, space.name, more), inputs) > BROKEN, more


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_ops_fix_what_they_touch_and_are_named(name):
    model, spec, inputs = seeded(lambda: Between(Case(UNKNOWN[name], FIXED)), (2, 5, 6))
    (hidden,) = spaces_of(spec, "first.weight", 0)
    (op,) = spec.unknown_ops
    assert op.startswith(name)
    assert hidden.symmetry is FIXED
    assert op in hidden.frozen_by
    assert worst_error(model, spec, inputs) <= TOLERANCE


@pytest.mark.parametrize("name", WHOLE)
def test_whole_modules_prove(name):
    model, spec, inputs = seeded(*WHOLE[name])
    assert set(spec.axes) | spec.unused == {name for name, _ in [*model.named_parameters(), *named_buffers(model)]}
    assert worst_error(model, spec, inputs, range(5)) <= TOLERANCE


def named_buffers(model: nn.Module):
    return model.named_buffers(remove_duplicate=False)


@pytest.mark.parametrize("kind", ["manual", "sdpa", "einsum", "merged"])
def test_attention_shares_one_head_order_and_every_head_has_its_own_bases(kind):
    _, spec, _ = seeded(lambda: Attention(kind), (2, 5, 6))
    query, key, value = ([s.name for s in spaces_of(spec, f"{n}.weight", 0)] for n in ("query", "key", "value"))
    assert query == key
    assert query[0] == value[0]
    assert query[1] != value[1]
    assert [s.name for s in spaces_of(spec, "out.weight", 1)] == value
    heads, inner = spaces_of(spec, "query.weight", 0)
    assert (heads.size, heads.symmetry) == (HEADS, PERMUTATION)
    assert (inner.size, inner.symmetry, inner.within) == (HEAD_DIM, LINEAR, (heads.name,))


@pytest.mark.parametrize("kind", ["sdpa", "manual"])
def test_grouped_queries_move_with_their_keys(kind):
    _, spec, _ = seeded(lambda: Attention(kind, groups=GROUPS), (2, 5, 6))
    groups, copies, inner = spaces_of(spec, "query.weight", 0)
    assert [s.name for s in spaces_of(spec, "key.weight", 0)] == [groups.name, inner.name]
    assert (groups.size, copies.size, inner.size) == (GROUPS, HEADS // GROUPS, HEAD_DIM)
    assert copies.within == inner.within == (groups.name,)  # the dims are the key's, which all copies share


@pytest.mark.parametrize("by", ["chunk", "inner chunk", "unbind", "select", "heads"])
def test_the_pieces_of_fused_projections_are_spaces_of_their_own(by):
    model, spec, inputs = seeded(lambda: Fused(by), (2, 5, 6))
    assert worst_error(model, spec, inputs) <= TOLERANCE
    (label,) = {spec.axes[f"qkv.{name}"][0] for name in ("weight", "bias")}
    query, key, value = products(label)
    assert [[f.dual for f in product] for product in (query, key, value)] == [[False] * 2, [False, True], [False] * 2]
    assert product_key(query) == product_key(key) != product_key(value)
    for heads, inner in (map(spec.spaces.get, product_key(product)) for product in (query, value)):
        assert (heads.symmetry, inner.symmetry, inner.within) == (PERMUTATION, LINEAR, (heads.name,))
    assert spec.axes["out.weight"][1] == flipped(value)


def test_windows_that_share_memory_leave_what_they_do_not_slide_over():
    model, spec, inputs = seeded(Windows, (2, 8, 6))
    assert spec.spaces["up"].symmetry is LINEAR and not spec.unknown_ops
    assert worst_error(model, spec, inputs) <= TOLERANCE


def test_a_gate_moves_with_what_it_gates_and_not_with_what_stands_beside_them():
    _, spec, _ = seeded(Gated, (2, 5, 6))
    gate, up = spaces_of(spec, "fused.weight", 0)
    assert gate == up
    beside, read = spaces_of(spec, "last.weight", 1)
    assert (beside.symmetry, read) == (FIXED, up)


@pytest.mark.parametrize("ordered", [True, False])
def test_experts_change_places_and_have_units_of_their_own(ordered):
    model, spec, inputs = seeded(lambda: Routed(ordered=ordered), (2, 5, 6))
    experts, hidden, stream = (spaces_of(spec, "up", axis)[0] for axis in range(3))
    assert [experts] == spaces_of(spec, "router.weight", 0) == spaces_of(spec, "down", 0)
    assert (experts.symmetry, stream.symmetry) == (PERMUTATION, LINEAR)
    assert (hidden.symmetry, hidden.within, stream.within) == (PERMUTATION, (experts.name,), ())
    for space in (experts, hidden):
        for more in next_symmetries(space):
            assert worst_error(model, with_symmetry(spec, space.name, more), inputs) > BROKEN


@pytest.mark.parametrize(("by", "ordered", "free"), [("order", True, True), ("order", False, False)])
def test_what_is_chosen_in_no_order_is_fixed_where_an_order_counts(by, ordered, free):
    _, spec, _ = seeded(lambda: Routed(by, ordered=ordered), (2, 5, 6))
    assert spec.movable(spaces_of(spec, "up", 0)[0].name) is free


def test_experts_whose_numbers_count_keep_their_places():
    model, spec, inputs = seeded(lambda: Routed("numbers"), (2, 5, 6))
    experts, hidden = spaces_of(spec, "up", 0)[0], spaces_of(spec, "up", 1)[0]
    assert (experts.symmetry, hidden.symmetry, hidden.within) == (FIXED, PERMUTATION, (experts.name,))
    assert worst_error(model, with_symmetry(spec, experts.name, PERMUTATION), inputs) > BROKEN


def test_experts_whose_tokens_meet_have_their_units_in_one_order():
    model, spec, inputs = seeded(lambda: Routed("next"), (2, 5, 6))
    experts, hidden = spaces_of(spec, "up", 0)[0], spaces_of(spec, "up", 1)[0]
    assert hidden.within == ()
    wrong = replace(spec, spaces={**spec.spaces, hidden.name: replace(hidden, within=(experts.name,))})
    assert worst_error(model, wrong, inputs) > BROKEN


def test_what_no_slice_takes_stays_fixed():
    """How much of a table is left depends on the input, which a short one must not decide."""
    _, spec, _ = seeded(lambda: Between(Case(lambda x: x[..., :4].repeat(1, 1, 2), LINEAR)), (2, 5, 6))
    assert [s.symmetry for s in spaces_of(spec, "first.weight", 0)] == [LINEAR, FIXED]


@pytest.mark.parametrize("name", MIXING)
def test_heads_that_meet_share_one_basis(name):
    function, out, own = MIXING[name]
    model, spec, inputs = seeded(lambda: HeadMixing(function, out), (2, 5, 6))
    heads, inner = spaces_of(spec, "first.weight", 0)
    assert inner.within == ((heads.name,) if own else ())
    used = [{factor.space for label in labels for factor in label} for labels in spec.axes.values()]
    together = all(heads.name in names for names in used if inner.name in names)
    if not own and inner.symmetry is not FIXED and together:
        wrong = replace(spec, spaces={**spec.spaces, inner.name: replace(inner, within=(heads.name,))})
        assert worst_error(model, wrong, inputs) > BROKEN


def test_cuts_that_do_not_nest_fix_the_axis():
    _, spec, _ = seeded(TwoCuts, (2, 5, 6))
    assert {space.symmetry for space in spaces_of(spec, "first.weight", 0)} == {FIXED}


@pytest.mark.parametrize("function", [rotary_cut_before, rotary_cut_after])
def test_rotary_embeddings_whose_pairs_are_torn_apart_fix_the_axis(function):
    _, spec, _ = seeded(lambda: Between(Case(function, FIXED)), (2, 5, 6))
    assert {space.symmetry for space in spaces_of(spec, "first.weight", 0)} == {FIXED}


def test_what_pairs_are_multiplied_by_moves_with_their_heads():
    case = Case(scaled_and_rotated_by_head, FIXED, extra={"v": torch.tensor([0.3, -1.0, 0.7, 2.0])})
    model, spec, inputs = seeded(lambda: Between(case), (2, 5, 6))
    heads, inner = spaces_of(spec, "first.weight", 0)
    assert spaces_of(spec, "v", 0) == [heads]
    assert (heads.symmetry, inner.symmetry, inner.within) == (PERMUTATION, Symmetry.ROTARY, (heads.name,))
    assert worst_error(model, spec, inputs) <= TOLERANCE
    for more in next_symmetries(heads):
        assert worst_error(model, with_symmetry(spec, heads.name, more), inputs) > BROKEN


@pytest.mark.parametrize(("norm", "symmetry"), [(nn.RMSNorm, ORTHOGONAL), (nn.LayerNorm, ONES)])
def test_a_stream_under_norms_without_affine_part_can_be_rotated(norm, symmetry):
    model, spec, inputs = seeded(lambda: ResidualStream(norm(8, elementwise_affine=False)), (2, 5, 6))
    (stream,) = spaces_of(spec, "embed.weight", 0)
    assert stream.name == "residual"
    assert stream.symmetry is symmetry
    assert [s.symmetry for s in spaces_of(spec, "up.0.weight", 0)] == [PERMUTATION]
    for more in next_symmetries(stream):
        assert worst_error(model, with_symmetry(spec, "residual", more), inputs) > BROKEN


def test_grouped_convolutions_and_group_norms_split_their_channels():
    _, spec, _ = seeded(Convolutional, (2, 3, 8, 8))
    groups, inner = spaces_of(spec, "stem.weight", 0)
    assert (groups.size, inner.size, inner.within) == (4, 2, (groups.name,))
    assert [s.name for s in spaces_of(spec, "bn.running_var", 0)] == [groups.name, inner.name]
    assert [s.size for s in spaces_of(spec, "gn.weight", 0)] == [4, 3, 2]
    assert spaces_of(spec, "gn.weight", 0)[0] == groups


def test_lengths_of_normed_weights_move_with_their_units():
    _, spec, _ = seeded(*WHOLE["weight norms"])
    lengths, directions = (f"first.parametrizations.weight.original{i}" for i in range(2))
    assert spaces_of(spec, lengths, 0) == spaces_of(spec, directions, 0)
    spaces = [spaces_of(spec, f"{name}.parametrizations.weight.original1", 0) for name in ("first", "conv", "grouped")]
    symmetries = [[space.symmetry for space in found] for found in spaces]
    assert symmetries == [[PERMUTATION], [PERMUTATION, ORTHOGONAL], [PERMUTATION, PERMUTATION]]


def test_units_with_lengths_of_their_own_are_reordered_at_most():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3)), {"input": torch.randn(2, 5, 6)}
    spec = MergeSpec.from_model(model, inputs)
    (hidden,) = spaces_of(spec, "1.weight", 1)
    assert hidden.symmetry is PERMUTATION
    for more in next_symmetries(hidden):
        assert worst_error(model, with_symmetry(spec, hidden.name, more), inputs) > BROKEN


def test_one_tensor_under_two_names_has_one_label():
    torch.manual_seed(0)
    _, spec, _ = seeded(*WHOLE["tied buffers"])
    assert spec.axes["first.scale"] == spec.axes["second.scale"]


@pytest.mark.parametrize("saved", [True, False])
def test_a_table_that_is_not_saved_stays_as_it_is(saved):
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 4)
            self.register_buffer("places", torch.randn(5, 16), persistent=saved)

        def forward(self, x):
            return self.down(self.up(x) + self.places)

    spec = MergeSpec.from_model(Placed(), {"x": torch.randn(2, 5, 6)})
    (space,) = spaces_of(spec, "down.weight", 1)
    assert space.symmetry is (LINEAR if saved else FIXED)


def test_integers_are_reordered_at_most():
    _, spec, _ = seeded(*WHOLE["learned queries"])
    assert [s.symmetry for s in spaces_of(spec, "rows", 0)] == [Symmetry.PERMUTATION]


def test_a_model_that_cannot_be_traced_is_told_in_one_sentence():
    class Jumpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return x if self.lin(x).sum() > 0 else -x

    with pytest.raises(SpecError, match="Jumpy could not be traced with inputs \\['x'\\]"):
        MergeSpec.from_model(Jumpy(), {"x": torch.ones(2, 3)})


def test_where_a_model_asks_its_inputs_the_way_that_they_take_is_traced():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 16), nn.Linear(16, 4)

        def forward(self, x, mask):
            hidden = self.up(x)
            return self.down(hidden.relu() if mask.any() else hidden)

    for mask, symmetry in ((torch.ones(2, 1), Symmetry.PERMUTATION), (torch.zeros(2, 1), Symmetry.LINEAR)):
        inputs = {"x": torch.randn(2, 3), "mask": mask}
        spec = MergeSpec.from_model(Asking(), inputs)
        assert spec.spaces["up"].symmetry is symmetry
        assert prove(Asking(), spec, inputs=inputs) <= TOLERANCE


def test_places_that_the_inputs_name_are_read_however_large_what_weights_made_is():
    """As Longformer's global tokens: how many there are is in the inputs, and it asks how wide a tensor became."""

    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 16), nn.Linear(16, 4)

        def forward(self, x, mask):
            hidden, most = self.up(x), mask.long().sum(1).max()
            rows, places = mask.nonzero(as_tuple=True)
            marked = hidden.new_zeros(2, most, 16)
            marked[rows, places * 0] = hidden[rows, places]
            wide = torch.cat([marked, hidden], 1)
            wide = wide.relu() if wide.size(1) == 7 else wide
            return self.down(wide.narrow(1, most, wide.size(1) - most))

    inputs = {"x": torch.randn(2, 5, 3), "mask": torch.tensor([[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])}
    torch.manual_seed(0)
    model = Marked()
    spec = MergeSpec.from_model(model, inputs)
    assert spec.spaces["up"].symmetry is Symmetry.LINEAR and not spec.unknown_ops
    assert prove(model, spec, inputs=inputs) <= TOLERANCE
