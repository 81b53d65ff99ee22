"""What must hold for every rule that merges LoRA updates, and what each promises, against full updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_zipit.errors import RecipeError
from hf_zipit.lora.factors import Factors, singular, truncated
from hf_zipit.lora.rule import Given
from hf_zipit.registry import LORA_RULES, RULES

TASKS = ("a", "b", "c")
RANKS = (2, 3, 1)
OUT, IN, ROWS = 11, 9, 60

each_rule = pytest.mark.parametrize("name", LORA_RULES.names())

SPACES = ("core-space", "knots")
SURE = {"core-space": {"combine": "average"}, "knots": {"combine": "average"}}
"""Options with which a rule neither drops nor scales anything."""


def drawn(ranks: tuple[int, ...] = RANKS, seed: int = 0, out: int = OUT, inputs: int = IN) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factors(some(out, rank), some(rank, inputs)) for rank in ranks]


def dense(update: Factors) -> Tensor:
    return update.b @ update.a


def rows(seed: int = 5, inputs: int = IN) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, inputs, generator=generator, dtype=torch.float64) for _ in TASKS]


def merged(name: str, layer: list[Factors], data: list[Tensor] | None = None, **options: object) -> Factors:
    data = rows() if data is None else data
    a = torch.cat([own.a for own in layer])
    moments = [a @ x.T @ x @ a.T / len(x) for x in data[: len(layer)]]
    given = Given(TASKS[: len(layer)], 0, {"layer": moments})
    return LORA_RULES.get(name).merge({"layer": layer}, given, {**SURE.get(name, {}), **options})["layer"]


@each_rule
def test_copies_give_the_copy(name: str):
    (one,) = drawn((3,))
    torch.testing.assert_close(dense(merged(name, [one] * 3)), dense(one), rtol=1e-8, atol=1e-8)


@each_rule
@pytest.mark.parametrize("combine", [None, "ties", "iso-c", "tsv-m"])
def test_the_order_of_the_experts_changes_nothing(name: str, combine: str | None):
    if name == "knots" and combine == "tsv-m":
        return  # the V_t's spectra are flat: which directions are the first is nobody's choice
    options = {"combine": combine} if combine and name in SPACES else {}
    layer, data = drawn(), rows()
    forth, back = merged(name, layer, data, **options), merged(name, layer[::-1], data[::-1], **options)
    torch.testing.assert_close(dense(forth), dense(back), rtol=1e-8, atol=1e-8)


@each_rule
def test_experts_that_learnt_nothing_give_nothing(name: str):
    nothing = [Factors(torch.zeros_like(own.b), own.a) for own in drawn()]
    assert not dense(merged(name, nothing)).any()
    assert not dense(merged(name, [Factors(own.b[:, :0], own.a[:0]) for own in drawn()])).any()


@each_rule
def test_nothing_is_changed_in_place(name: str):
    layer = drawn()
    merged(name, layer)
    assert all(
        torch.equal(x, y) for one, two in zip(layer, drawn(), strict=True) for x, y in zip(one, two, strict=True)
    )


class Largest(TorchFunctionMode):
    """The number of entries of the largest tensor that any function of torch returns."""

    seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else (result,):
            self.seen = max(self.seen, found.numel()) if isinstance(found, Tensor) else self.seen
        return result


@each_rule
def test_the_update_of_a_wide_layer_is_never_formed(name: str):
    wide, layer = 700, drawn(out=700, inputs=650)
    data = rows(inputs=650)
    a = torch.cat([own.a for own in layer])
    moments = [a @ x.T @ (x @ a.T) for x in data]
    with Largest() as largest:
        found = LORA_RULES.get(name).merge({"layer": layer}, Given(TASKS, 0, {"layer": moments}), SURE.get(name, {}))
        truncated(found["layer"], 2)
    assert 0 < largest.seen <= wide * sum(RANKS) * len(TASKS)  # KnOTS: T parts of `[sum r, in]`
    with Largest() as largest:
        dense(layer[0])
    assert largest.seen == 700 * 650


@pytest.mark.parametrize("name", SPACES)
def test_linear_rules_lose_nothing_in_a_space(name: str):
    layer = drawn()
    mean = sum(map(dense, layer)) / 3
    torch.testing.assert_close(dense(merged(name, layer)), mean, rtol=1e-10, atol=1e-10)
    found = merged(name, layer, combine="task-arithmetic", options={"scale": 0.7})
    torch.testing.assert_close(dense(found), 2.1 * mean, rtol=1e-10, atol=1e-10)
    assert found.rank <= sum(RANKS)


def test_linear_is_the_weighted_sum():
    layer = drawn()
    found = merged("linear", layer, weights={"c": 3.0, "a": -1.0, "b": 0.5})
    torch.testing.assert_close(dense(found), -dense(layer[0]) + 0.5 * dense(layer[1]) + 3 * dense(layer[2]))
    for wrong in ([1.0], {"a": 1.0}):
        with pytest.raises(RecipeError, match="linear's option weights"):
            merged("linear", layer, weights=wrong)


def reference(combine: str, parts: list[Tensor]) -> Tensor:
    given = {"base": torch.zeros_like(parts[0]), "generator": torch.Generator().manual_seed(0)}
    return RULES.get(combine).combine(parts, (), None, {}, **given)


@pytest.mark.parametrize("combine", ["ties", "iso-c", "tsv-m", "wudi"])
def test_core_space_is_the_rule_on_the_cores(combine: str):
    """Reference from the equations, on the stacked factors' own SVDs."""
    layer = drawn()
    u = torch.linalg.svd(torch.cat([own.b for own in layer], 1), full_matrices=False)[0]
    v = torch.linalg.svd(torch.cat([own.a for own in layer]), full_matrices=False)[2]
    expected = u @ reference(combine, [u.T @ dense(own) @ v.T for own in layer]) @ v
    torch.testing.assert_close(dense(merged("core-space", layer, combine=combine)), expected, rtol=1e-8, atol=1e-8)


def test_iso_in_core_space_is_iso_on_the_full_updates():
    """Its singular values and directions are those of the sum, in either space."""
    layer = drawn()
    expected = reference("iso-c", list(map(dense, layer)))
    torch.testing.assert_close(dense(merged("core-space", layer, combine="iso-c")), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("combine", ["ties", "task-arithmetic"])
def test_knots_merges_the_parts_of_v(combine: str):
    """Reference from the equations, on the full updates next to each other."""
    layer = drawn()
    u, s, v = torch.linalg.svd(torch.cat(list(map(dense, layer)), 1), full_matrices=False)
    rank = sum(RANKS)
    expected = (u[:, :rank] * s[:rank]) @ reference(combine, list(v[:rank].split(IN, 1)))
    torch.testing.assert_close(dense(merged("knots", layer, combine=combine)), expected, rtol=1e-8, atol=1e-8)


def test_ssr_is_the_least_squares_solution():
    layer, data = drawn(), rows()
    a = torch.cat([own.a for own in layer])
    z = torch.cat([x @ a.T for x in data])
    wanted = torch.cat([x @ dense(own).T for x, own in zip(data, layer, strict=True)])
    expected = torch.linalg.lstsq(z, wanted).solution.T @ a
    torch.testing.assert_close(dense(merged("ssr", layer, data)), expected, rtol=1e-8, atol=1e-8)


def test_a_truncated_update_is_the_nearest_of_its_rank():
    (update,) = drawn((5,))
    u, s, v = torch.linalg.svd(dense(update), full_matrices=False)
    torch.testing.assert_close(dense(truncated(update, 2)), (u[:, :2] * s[:2]) @ v[:2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(singular(update)[1], s[:5])
    assert truncated(update, 2).rank == 2 and truncated(update, 7) is update


def test_shares_are_counted_over_all_layers():
    """Of two layers, one a thousand times the other, TIES keeps entries of the larger one alone."""
    small, large = drawn(), [Factors(1000 * own.b, own.a) for own in drawn(seed=1)]
    options = {"combine": "ties", "options": {"share": 0.2}}
    found = LORA_RULES.get("core-space").merge({"s": small, "l": large}, Given(TASKS), options)
    assert not dense(found["s"]).any() and dense(found["l"]).any()


@pytest.mark.parametrize("name", SPACES)
def test_rules_that_read_data_are_refused_in_a_space(name: str):
    with pytest.raises(RecipeError, match=f"{name}'s option combine is 'regmean'"):
        merged(name, drawn(), combine="regmean")
