"""What must hold for every combining rule, and what each one promises, against straightforward float64 references."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import merge
from hf_zipit.combine.combine import combine_trunk, combined_parts, joined
from hf_zipit.errors import ExpertError, RecipeError
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.merging import plan
from hf_zipit.registry import RULES
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import Factor
from tests import tiny
from tests.align.toys import space, spec_of
from tests.combine.data import Data

each_rule = pytest.mark.parametrize("name", RULES.names())

DRAW = ("dare", "dare-ties", "della")
"""Rules that draw what they drop."""

COPIES = {
    "average": {}, "weighted": {}, "slerp": {}, "karcher": {}, "model-stock": {}, "cart": {}, "actmat": {},
    "wudi": {"ridge": 1e-13}, "ace": {"ridge": 1e-13}, "ties": {"share": 1.0}, "tsv-m": {"share": 1.0},
    "task-arithmetic": {"scale": "1/T"}, "consensus": {"scale": "1/T", "threshold": 0.2},
    "breadcrumbs": {"scale": "1/T", "smallest": 0.0, "largest": 0.0}, "dare": {"scale": "1/T", "drop": 0.0},
    "dare-ties": {"drop": 0.0}, "della": {"drop": 0.0, "spread": 0.0},
    "svc": {"after": "ties", "options": {"share": 1.0}}, "regmean": {}, "regmean++": {}, "lot": {}, "mats": {},
    "fisher": {}, "featcal": {"after": "cart", "reach": 1.0},
}  # fmt: skip
"""Rules that give copies of one expert back, and the options with which they neither drop nor scale anything."""

NO_COPIES = {
    "pcb": "the least of the chosen entries has the weight 0",
    "iso-c": "it makes the spectrum flat",
    "iso-cts": "it makes the spectrum flat",
}
"""Rules that do not, and why."""


def tensors(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def combined(name: str, experts: list[Tensor], base: Tensor, data: Data | None = None, **options: object) -> Tensor:
    data = data or Data.draw(len(experts), 6, 5)
    generator = torch.Generator().manual_seed(0)
    given = {"base": base, "generator": generator, **data.given(experts)}
    return RULES.get(name).combine(experts, (), None, options, **given)


def counts(name: str) -> tuple[int, ...]:
    """How many experts a rule is tried with."""
    return (2,) if name == "slerp" else (2, 3, 5)


@each_rule
def test_the_order_of_the_experts_changes_nothing(name: str):
    for count in () if name in DRAW else counts(name):
        experts, (base,) = tensors(count), tensors(1, seed=1)
        data = Data.draw(count, 6, 5)
        found = combined(name, experts[::-1], base, data.reversed())
        torch.testing.assert_close(found, combined(name, experts, base, data), rtol=1e-10, atol=1e-10)


@each_rule
def test_nothing_is_changed_in_place(name: str):
    experts, (base,) = tensors(2), tensors(1, seed=1)
    combined(name, experts, base)
    assert all(torch.equal(x, y) for x, y in zip([*experts, base], [*tensors(2), *tensors(1, seed=1)], strict=True))


@each_rule
def test_experts_that_learnt_nothing_give_the_base(name: str):
    for base in (*tensors(1), torch.zeros(6, 5, dtype=torch.float64)):
        data = Data.draw(2, 6, 5).agreeing()
        torch.testing.assert_close(combined(name, [base, base], base, data), base, rtol=1e-12, atol=1e-12)


@each_rule
def test_copies_give_the_copy(name: str):
    assert (name in COPIES) != (name in NO_COPIES), "say whether the rule gives copies back, and with which options"
    for count in counts(name) if name in COPIES else ():
        (one,), (base,) = tensors(1), tensors(1, seed=1)
        options = {option: 1 / count if value == "1/T" else value for option, value in COPIES[name].items()}
        data = Data.draw(count, 6, 5).agreeing()
        torch.testing.assert_close(combined(name, [one] * count, base, data, **options), one, rtol=1e-8, atol=1e-8)


@each_rule
def test_units_may_be_in_any_order(name: str):
    """The rule on reordered tensors is the rule's result, reordered."""
    rows, columns = torch.randperm(6), torch.randperm(5)
    experts, (base,) = tensors(2), tensors(1, seed=1)
    if name not in DRAW:
        data = Data.draw(2, 6, 5).reordered(rows, columns)
        found = combined(name, [x[rows][:, columns] for x in experts], base[rows][:, columns], data)
        torch.testing.assert_close(found, combined(name, experts, base)[rows][:, columns], rtol=1e-9, atol=1e-9)


# Task arithmetic.


@cache
def experts() -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


@cache
def base() -> nn.Module:
    return tiny.build("vit", 7, num_labels=3)


def test_task_arithmetic_is_the_base_and_the_scaled_sum_of_the_task_vectors():
    settings = {"method": "identity", "combine": "task-arithmetic", "combine_options": {"scale": 0.3}}
    found = model_tensors(merge(experts(), base=base(), **settings).trunk)
    start, own = model_tensors(base()), [model_tensors(model) for model in experts().values()]
    assert found
    for name, tensor in found.items():
        if tensor.is_floating_point():
            origin = start[name].double()
            expected = origin + 0.3 * ((own[0][name].double() - origin) + (own[1][name].double() - origin))
            assert torch.equal(tensor, expected.float()), name


def test_a_base_for_every_expert_moves_with_it_and_the_mean_is_the_origin():
    """Expert 1's units are in another order than expert 0's, and its base's are as well."""
    spec = spec_of(space("units", 4))
    labels = ((Factor("units"),),)
    order = torch.tensor([2, 0, 3, 1])
    maps = {"units": SpaceMap(4, torch.stack([torch.arange(4), order]))}
    merged = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (own, start), (other, other_start) = merged[:2], merged[2:]
    parts = combined_parts(
        [own, other[order]], labels, maps, spec,
        lambda moved, _, base: RULES.get("task-arithmetic").function(moved, labels, None, base=base, scale=0.4),
        [start, other_start[order]],
    )  # fmt: skip
    found = joined(parts)
    expected = (start + other_start) / 2 + 0.4 * ((own - start) + (other - other_start))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_base_for_each_expert_in_a_merge():
    bases = {"a": tiny.build("vit", 7, num_labels=3), "b": tiny.build("vit", 8, num_labels=4)}
    planned = plan(experts(), method="identity", combine="task-arithmetic", base=bases)
    found = combine_trunk(planned, {})
    starts, own = ([model_tensors(m) for m in models.values()] for models in (bases, experts()))
    for name in found:
        if found[name].is_floating_point():
            vectors = [(x[name].double() - s[name].double()) for x, s in zip(own, starts, strict=True)]
            expected = sum(s[name].double() for s in starts) / 2 + 0.4 * sum(vectors)
            torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-7)
    merged = merge(experts(), method="identity", combine="task-arithmetic", base=bases)
    assert set(merged.config.method["bases"]) == {"a", "b"}


# What is refused, before work starts.


class Unread:
    def __iter__(self):
        raise AssertionError("data was read")


@pytest.mark.parametrize(
    ("settings", "with_base", "message"),
    [
        ({"combine": "task-arithmetic"}, False, "pass the model that they started from as base="),
        ({"combine": "average"}, True, r"reads no base; .*'task-arithmetic'"),
        ({"combine": "task-arithmetic", "combine_options": {"scale": 0.0}}, True, "scale is 0.0; it must be above 0"),
        ({"combine": "task-arithmetic", "combine_options": {"scael": 1.0}}, True, "did you mean 'scale'"),
        ({"combine": "averag"}, False, "did you mean 'average'"),
    ],
)
def test_wrong_rules_are_told_before_data_is_read(settings: dict, with_base: bool, message: str):
    with pytest.raises(RecipeError, match=message) as told:
        merge(experts(), Unread(), method="zip", base=base() if with_base else None, **settings)
    assert "\n" not in str(told.value)


def test_bases_that_do_not_fit_are_told():
    settings = {"method": "identity", "combine": "task-arithmetic"}
    with pytest.raises(ExpertError, match=r"base= names \['a'\], but the experts are \['a', 'b'\]"):
        plan(experts(), base={"a": base()}, **settings)
    with pytest.raises(ExpertError, match="in the base of 'a', but .* in the experts"):
        plan(experts(), base=tiny.build("vit", 7, intermediate_size=48), **settings)


def test_numbers_that_overflow_are_told():
    large = copy.deepcopy(experts()["a"])
    with torch.no_grad():
        large.vit.layernorm.weight.fill_(3e38)
    settings = {"method": "identity", "combine": "task-arithmetic", "combine_options": {"scale": 2.0}}
    with pytest.raises(ExpertError, match="layernorm.weight is not finite; check .* options of combine='task-arithm"):
        merge({"a": large, "b": large}, base=base(), **settings)
