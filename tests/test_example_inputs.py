"""Inputs that a user gives for the trace, and the plain torch modules that need them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import hf_zipit
from hf_zipit.errors import DataError, RecipeError, SpecError
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors


class Plain(nn.Module):
    """A convolution, a norm, an encoder layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.layer(self.net(pixels).flatten(2).mT).mean(1))


INPUTS = {"pixels": torch.randn(2, 3, 5, 5)}


def reordered_pair():
    torch.manual_seed(0)
    model = Plain().eval()
    spec = MergeSpec.from_model(model, INPUTS)
    moved = apply_element(
        model_tensors(model), spec, random_element(spec, torch.Generator().manual_seed(1), permutations_only=True)
    )
    other = copy.deepcopy(model)
    other.load_state_dict(moved)
    return {"a": model, "b": other}


@pytest.mark.parametrize("data", [None, {"pixels": torch.randn(64, 3, 5, 5)}])
def test_a_plain_module_and_its_reordered_copy_become_one_of_their_class(data):
    experts = reordered_pair()
    merged = hf_zipit.merge(experts, data, example_inputs=INPUTS)
    assert type(merged) is Plain and not merged.training
    assert torch.allclose(merged(**INPUTS), experts["a"](**INPUTS), atol=1e-5)


def test_what_a_plain_module_cannot_have_is_said_in_a_sentence():
    experts = reordered_pair()
    with pytest.raises(SpecError, match="example_inputs"):
        hf_zipit.merge(experts)
    with pytest.raises(RecipeError, match="plain torch module"):
        hf_zipit.merge(experts, INPUTS, example_inputs=INPUTS, refit={})
    with pytest.raises(DataError, match="example_inputs"):
        hf_zipit.merge(experts, example_inputs=[INPUTS])


def test_given_inputs_decide_what_is_traced():
    config = T.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=20,
        max_position_embeddings=9,
    )  # fmt: skip
    experts = {task: T.BertForMaskedLM(config) for task in "ab"}
    given = {"inputs_embeds": torch.randn(2, 3, 8), "attention_mask": torch.ones(2, 3)}
    planned = hf_zipit.plan(experts, data=False, example_inputs=given)
    assert planned.spec.outputs and planned.spec.macs
    assert any("inputs_embeds" in (space.frozen_by or "") for space in planned.spec.spaces.values())
    with pytest.raises(SpecError, match="example_inputs"):
        hf_zipit.plan(experts, data=False, example_inputs={"pixels": torch.randn(2, 3)})
