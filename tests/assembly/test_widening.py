"""Which spaces may be wider: what is said to hold does, in merged models, and what does not is left out."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_zipit.adapters import adapter_for
from hf_zipit.align.methods.partial import keep_apart
from hf_zipit.assembly.assemble import assemble
from hf_zipit.assembly.widening import widenable_spaces
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.merging import merge, plan
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.proof import model_tensors, perturb
from hf_zipit.symmetry.trace import select_outputs
from tests import tiny

WIDENABLE = [name for name in tiny.TRUNKS if name != "bit"]
"""Of BiT nothing is: GroupNorm everywhere."""


@cache
def planned_for(name: str) -> tuple[PreTrainedModel, Plan, frozenset[str]]:
    model = tiny.build(name)
    planned = plan({"a": model, "b": model}, method="identity")
    return model, planned, widenable_spaces(model, planned.spec)


def kinds(spaces: frozenset[str]) -> set[str]:
    """The last parts of the names, without what counts layers."""
    return {name.rpartition(".")[2] for name in spaces}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", {"heads", "fc1"}),
        ("bert", {"heads", "dense"}),
        ("gpt2", {"c_fc"}),
        ("llama", {"heads", "gate_proj"}),
        ("qwen3", {"heads", "gate_proj"}),
        ("resnet-basic", {"residual", "convolution"}),
        ("convnext", {"pwconv1"}),
    ],
)
def test_what_may_be_wider(name: str, expected: set[str]):
    """LayerNorm takes its statistics over the residual stream, a batch norm every channel's own; a `view` knows the
    width of a head, but not their number. Queries that share a key are as many in every head (qwen3's attention in one
    op would take more of them, eager attention does not)."""
    assert kinds(planned_for(name)[2]) == expected


def test_channels_with_a_kernel_of_their_own_may_be_more():
    """The number of groups of a depthwise convolution is that of its channels."""
    assert any("expand_1x1" in name for name in planned_for("mobilenet-v2")[2])


def test_nothing_may_be_wider_is_told_before_data_is_read():
    class Unread:
        def __iter__(self):
            raise AssertionError("data was read")

    model = tiny.build("bit")
    with pytest.raises(RecipeError, match="No layer of BitForImageClassification can be made wider"):
        merge({"a": model, "b": model}, Unread(), method="partial")


@pytest.mark.parametrize("name", tiny.mostly_seldom(WIDENABLE))
def test_wide_merged_models_compute_their_expert(name: str, tmp_path: Path):
    """All of an architecture's spaces wider at once, in the class that is saved."""
    model, planned, wide = planned_for(name)
    model = copy.deepcopy(model)
    model.load_state_dict(perturb(model.state_dict(), torch.Generator().manual_seed(0)))
    maps = {
        s.name: some_apart(s.name, planned.spec, wide)
        for s in planned.spec.spaces.values()
        if planned.spec.movable(s.name)
    }
    experts = {"a": model, "b": model}
    planned = replace(planned, experts=experts, folded=experts)
    merged = assemble(planned, combine_trunk(planned, maps), maps)
    assert merged.config.trunk_shapes
    inputs = adapter_for(model).inputs(model)
    expected = outputs(model, inputs, model)
    for task in experts:
        for field, found in outputs(merged, inputs, model, task=task).items():
            assert_close(found, expected[field])
    merged.save_pretrained(tmp_path)
    loaded, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for tensor, other in zip(model_tensors(merged).values(), model_tensors(loaded).values(), strict=True):
        assert torch.equal(tensor, other)
    for field, found in outputs(loaded, inputs, model, task="b").items():
        assert_close(found, expected[field])


def some_apart(name: str, spec: MergeSpec, wide: frozenset[str]) -> SpaceMap:
    """Identity, but for every third unit where a space may be wider; with rows for the units it lives within."""
    space = spec.spaces[name]
    sizes = [spec.spaces[outer].size for outer in space.within]
    lead = [n + len(range(0, n, 3)) * (outer in wide) for n, outer in zip(sizes, space.within, strict=True)]
    found = SpaceMap(space.size, torch.arange(space.size).expand(2, *lead, -1).contiguous())
    apart = torch.arange(0, space.size, 3).expand(*lead, -1)
    return keep_apart(found, apart) if name in wide else found


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor], like: PreTrainedModel, **kwargs: str) -> dict[str, Tensor]:
    return select_outputs(model(**inputs, **kwargs), adapter_for(like).outputs(like))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Hidden(PreTrainedModel):
    """A hidden layer, and something that looks at all of its units at once."""

    config_class = tiny.T.ViTConfig

    def __init__(self, config, across):
        super().__init__(config)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
        self.across = across

    def forward(self, pixel_values):
        x = self.across(self.up(pixel_values).relu())
        return BaseModelOutput(last_hidden_state=self.down(x))


ACROSS = {
    "nothing": (lambda x: x, True),
    "softmax": (lambda x: x.softmax(-1), False),
    "length": (lambda x: x / x.square().sum(-1, keepdim=True).sqrt(), False),
    "mean": (lambda x: x - x.mean(-1, keepdim=True), False),
    "size": (lambda x: x / x.shape[-1], False),
    "largest": (lambda x: x / (1 + x.amax(-1, keepdim=True)), True),
}


@pytest.mark.parametrize("across", ACROSS)
def test_units_that_are_looked_at_together(across: str):
    """All of these run at any width; only some compute the same when a unit is there twice with half the weight."""
    function, expected = ACROSS[across]
    model = Hidden(tiny.T.ViTConfig(**tiny.IMAGE), function)
    spec = MergeSpec.from_model(model, {"pixel_values": torch.randn(3, 4, 5)})
    name = next(name for name, space in spec.spaces.items() if space.size == 12)
    if not spec.movable(name):
        pytest.skip("nothing of it is ever moved")
    found = frozenset()
    try:
        found = widenable_spaces(model, spec, inputs={"pixel_values": torch.randn(3, 4, 5)})
    except RecipeError:
        assert not expected
    assert (name in found) == expected
