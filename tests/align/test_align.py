"""Whole specs: heads, grouped queries, composite-only observations, and the choices of the driver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_zipit.align.align import align, residual_spaces
from hf_zipit.align.method import Network, register
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.maps.products import merged_index, trace_out
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.registry import METHODS
from hf_zipit.symmetry.spec import Factor
from tests.align.toys import correlation, space, spec_of, vectors

HEADS = spec_of(space("stream", 6), space("heads", 4), space("query", 3, "heads"), space("value", 5, "heads"))
HEADS_KEYS = [("stream",), ("heads", "query"), ("heads", "value")]
ROTARY = spec_of(space("kv", 3), space("group", 2, "kv"), space("dim", 4, "kv", fixed=True), space("value", 3, "kv"))
GROUPED = spec_of(space("kv", 3), space("group", 2, "kv"), space("dim", 4, "kv"), space("value", 3, "kv"))
GROUPED_KEYS = [("kv", "dim"), ("kv", "group", "dim"), ("kv", "value"), ("kv", "group", "value")]
# Every head has the same norm inside, so that its dims are one free space.
SHARED = spec_of(space("heads", 4), space("dim", 3))
# The channels are seen only where they are flattened with the positions.
FLAT = spec_of(space("channels", 5), space("positions", 4, fixed=True))
NESTED = spec_of(space("a", 3), space("b", 2, "a"), space("c", 4, "a", "b"))
CASES = {
    "heads": (HEADS, HEADS_KEYS),
    "rotary": (ROTARY, GROUPED_KEYS),
    "grouped": (GROUPED, GROUPED_KEYS),
    "grouped, keys unseen": (GROUPED, GROUPED_KEYS[1:]),
    "shared dims": (SHARED, [("heads", "dim")]),
    "flattened": (FLAT, [("channels", "positions")]),
    "nested": (NESTED, [("a", "b", "c")]),
}


def features_of(spec, keys, generator, dead: bool) -> dict[tuple[str, ...], Tensor]:
    """Random features of one model, `[size, samples]` per product; a value that is dead is dead for all queries."""
    found, alive = {}, {}
    for key in keys:
        sizes = [spec.spaces[name].size for name in key]
        x = torch.randn(*sizes, 80, generator=generator)
        if dead:
            ends = alive.setdefault((key[0], key[-1]), torch.rand(sizes[0], sizes[-1], generator=generator) > 0.25)
            # (first, ..., last, samples), or (first, samples) where the product is one space alone.
            x *= ends.diagonal()[:, None] if len(key) == 1 else ends.reshape(sizes[0], *[1] * (len(key) - 2), -1, 1)
        found[key] = x.flatten(0, -2)
    return found


def random_symmetry(spec, generator) -> dict[str, SpaceMap]:
    """A random element of the group: one permutation for every merged unit of what a space lives within."""
    maps = {}
    for name, member in spec.spaces.items():
        if spec.movable(name):
            lead = [spec.spaces[outer].size for outer in member.within]
            rows = torch.rand(1, *lead, member.size, generator=generator).argsort(-1)
            maps[name] = SpaceMap(member.size, rows)
    return maps


def moved(features, maps, spec):
    """The features in the order that the maps give them."""
    return {
        key: torch.empty_like(x).index_copy_(0, merged_index(key, maps, spec, 0), x) for key, x in features.items()
    }


def recovered(features, alignment, spec, expert):
    return {
        key: torch.full_like(x, torch.nan).index_copy_(0, merged_index(key, alignment, spec, expert), x)
        for key, x in features.items()
    }


@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_permuted_copies_come_together(case, dead, experts, method):
    spec, keys = CASES[case]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        first = features_of(spec, keys, generator, dead)
        copies = [first] + [moved(first, random_symmetry(spec, generator), spec) for _ in range(experts - 1)]
        correlations = {key: correlation(*(copy[key] for copy in copies)) for key in keys}
        alignment = align(spec, correlations, experts, method)
        assert set(alignment) == {name for name in spec.spaces if spec.movable(name)}
        together = [recovered(copy, alignment, spec, expert) for expert, copy in enumerate(copies)]
        for other in together[1:]:
            for key in keys:
                assert torch.equal(other[key], together[0][key]), (case, key, seed)


@pytest.mark.parametrize("method", ["permute", "zip", "identity"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_model_twice_is_left_in_its_order(case, method):
    spec, keys = CASES[case]
    first = features_of(spec, keys, torch.Generator().manual_seed(0), dead=True)
    alignment = align(spec, {key: correlation(x, x) for key, x in first.items()}, 2, method)
    for found in alignment.values():
        assert torch.equal(found.labels, torch.arange(found.size).expand_as(found.labels))


def test_published_head_matching():
    file = vectors("mtt_permute_mha_h4x8")
    spec = spec_of(space("heads", 4), space("dim", 8, "heads"))
    found = align(spec, {("heads", "dim"): torch.from_numpy(file["corr"]).double()}, 2, "permute")
    partner = merged_index(("heads", "dim"), found, spec, 1).argsort().numpy()
    assert np.array_equal(partner, file["signed_headperm_merge"][:, 32:].argmax(1))
    hidden = file["true_idx"]
    assert np.array_equal(partner, hidden) or np.array_equal(partner, hidden.argsort())
    assert np.array_equal(found["heads"].labels[1].argsort().numpy(), file["signed_headperm_heads"])


def test_heads_are_permuted_by_zip_and_their_insides_are_zipped():
    generator = torch.Generator().manual_seed(0)
    correlations = {key: correlation(*torch.randn(2, HEADS.size(key), 20, generator=generator)) for key in HEADS_KEYS}
    found = align(HEADS, correlations, 2, "zip", options={"beta": 1.0})
    assert (found["heads"].counts() == 2).all()
    assert found["query"].labels.shape == (2, 4, 3)
    assert found["value"].labels.shape == (2, 4, 5)
    assert (found["value"].counts() != 2).any()
    assert (found["value"].counts().sum(-1) == 10).all()


def test_the_order_of_heads_is_one_for_all_products():
    """The values say that the heads are swapped, more clearly than the queries say that they are not."""
    spec = spec_of(space("heads", 2), space("query", 2, "heads"), space("value", 2, "heads"))
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    swapped = x[[2, 3, 0, 1]]
    for clear, vague in [("value", "query"), ("query", "value")]:
        correlations = {("heads", clear): correlation(x, swapped), ("heads", vague): correlation(x, x + 3 * noise)}
        assert align(spec, correlations, 2, "permute")["heads"].labels[1].tolist() == [1, 0]


def test_trace_out_compares_only_what_the_maps_bring_together():
    spec = spec_of(space("a", 2), space("b", 3))
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 0, 1], [1, 0, 1]])  # both merged units of b hold units of both experts
    found = trace_out(r, ("a", "b"), ("a",), {"b": SpaceMap(2, labels)}, spec, 2)
    means = [torch.nn.functional.one_hot(row).double() for row in labels]
    means = torch.stack([m / m.sum(0) for m in means])  # [T, b, merged]
    expected = torch.einsum("taiubj,tim,ujm->taub", r.reshape(2, 2, 3, 2, 2, 3), means, means) / 2
    torch.testing.assert_close(found, expected)


def test_unobserved_spaces_are_refused_where_there_are_no_weights_to_match_them_by():
    with pytest.raises(DataError, match="Nothing observes heads, query, value; give the experts' weights"):
        align(HEADS, {("stream",): torch.eye(12, dtype=torch.float64)}, 2, "zip")


def test_identity_needs_no_correlations(caplog):
    found = align(HEADS, {}, 3, "identity")
    assert {name: tuple(m.labels.shape) for name, m in found.items()} == {
        "stream": (3, 6), "heads": (3, 4), "query": (3, 4, 3), "value": (3, 4, 5),
    }  # fmt: skip
    assert not caplog.text


def matrix(*labels: str) -> tuple[tuple[Factor, ...], ...]:
    """Axis labels: `"stream"` holds a space's units, `"-stream"` reads them."""
    return tuple((Factor(label.lstrip("-"), label.startswith("-")),) for label in labels)


STREAM = spec_of(
    space("stream", 4),
    space("hidden", 4),
    axes={
        "embedding.weight": matrix("stream", "stream"),
        "one.up.weight": matrix("hidden", "-stream"),
        "one.down.weight": matrix("stream", "-hidden"),
        "one.down.bias": matrix("stream"),
        "norm.weight": matrix("stream"),
        "two.down.weight": matrix("stream", "-hidden"),
        "gate.weight": matrix("hidden", "-stream"),
        "hidden_norm.weight": matrix("hidden"),
        "hidden_norm.bias": matrix("hidden"),
    },
)


def swapped(units: int) -> Tensor:
    x = torch.randn(units, 30, generator=torch.Generator().manual_seed(0))
    return correlation(x, x.flip(0))


def test_the_residual_stream_is_what_three_modules_write_into():
    assert residual_spaces(STREAM) == ("stream",)


def test_heads_are_no_residual_stream():
    """Query, key and value write into the heads, and yet `residual="identity"` must leave them to the matcher."""
    projection = ((Factor("heads"), Factor("value")), (Factor("stream", dual=True),))
    names = ("q.weight", "k.weight", "v.weight")
    spec = spec_of(*HEADS.spaces.values(), axes=dict.fromkeys(names, projection))
    assert residual_spaces(spec) == ()


def test_residual_identity_and_overrides():
    correlations = {("stream",): swapped(4), ("hidden",): swapped(4)}
    same, flipped = [0, 1, 2, 3], [3, 2, 1, 0]

    def orders(**settings):
        found = align(STREAM, correlations, 2, settings.pop("method", "permute"), **settings)
        return found["stream"].labels[1].tolist(), found["hidden"].labels[1].tolist()

    assert orders() == (flipped, flipped)
    assert orders(residual="identity") == (same, flipped)
    assert orders(overrides={"hid*": "identity"}) == (flipped, same)
    assert orders(residual="identity", overrides={"*": {"method": "zip", "alpha": 0.5}}) == (flipped, flipped)
    assert orders(overrides={"stream": "identity", "*": "permute"}, method="identity") == (same, flipped)


def test_what_is_wrong_is_said():
    correlations = {("stream",): swapped(4), ("hidden",): swapped(4)}
    for arguments, message in [
        ({"method": "zap"}, "did you mean 'zip'"),
        ({"method": "zip", "options": {"alhpa": 1}}, "did you mean 'alpha'"),
        ({"residual": "keep"}, "'match', 'identity' or 'orthogonal'"),
        ({"overrides": {"strem*": "identity"}}, "matches no movable space"),
        ({"overrides": {"*": {"alpha": 1}}}, "names no method"),
    ]:
        with pytest.raises(RecipeError, match=message):
            align(STREAM, correlations, 2, **{"method": "permute", **arguments})
    with pytest.raises(DataError, match=r"\[8, 8\] where 3 experts need \[12, 12\]"):
        align(STREAM, correlations, 3, "permute")
    with pytest.raises(DataError, match="not finite"):
        align(STREAM, {("stream",): swapped(4) * torch.nan}, 2, "permute")


def test_a_whole_network_method_gets_the_fixed_maps(monkeypatch):
    METHODS.names()
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    seen = []

    @register("reverse", needs={"weights"}, scope="network")
    def reverse(network: Network, *, twice: bool = False):
        seen.append((set(network.fixed_maps), len(network.weights), twice))
        return {
            name: SpaceMap(s.size, torch.stack([torch.arange(s.size), torch.arange(s.size).flip(0)]))
            for name, s in network.spec.spaces.items()
            if name not in network.fixed_maps
        }

    found = align(STREAM, {}, 2, "reverse", residual="identity", weights=({}, {}), options={"twice": True})
    assert seen == [({"stream"}, 2, True)]
    assert found["stream"].labels[1].tolist() == [0, 1, 2, 3]
    assert found["hidden"].labels[1].tolist() == [3, 2, 1, 0]
    with pytest.raises(RecipeError, match="whole networks"):
        align(STREAM, {}, 2, "identity", overrides={"hidden": "reverse"})
