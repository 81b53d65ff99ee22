"""Heads that read several values of the trunk: every stage's, each in units of its own, or several of one stream."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T

import hf_zipit
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from tests import tiny

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
CASES = {
    "segformer": (
        tiny.of(
            T.SegformerForSemanticSegmentation, T.SegformerConfig, num_encoder_blocks=2, depths=[1, 1],
            hidden_sizes=[8, 16], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
            mlp_ratios=[2, 2], decoder_hidden_size=8, image_size=32,
        ),
        {"decode_head.linear_projections.0", "decode_head.linear_projections.1"},
    ),
    "dpt": (
        tiny.of(
            T.DPTForDepthEstimation, T.DPTConfig, **SMALL, image_size=32, patch_size=8,
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4,
        ),
        {"neck.reassemble_stage"},
    ),
    # Of the four maps that its decoding head is given, one comes from the trunk as it is, the others from the head.
    "beit": (
        tiny.of(
            T.BeitForSemanticSegmentation, T.BeitConfig, **SMALL, image_size=32, patch_size=8,
            out_indices=[1, 2, 3, 4], pool_scales=[1], use_auxiliary_head=False,
        ),
        {"fpn.fpn1", "fpn.fpn2", "fpn.fpn4", "decode_head.lateral_convs.2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_value_of_a_head_is_entered_in_the_tasks_own_units(name):
    builder, entered = CASES[name]
    torch.manual_seed(0)
    model = builder().eval()
    model.load_state_dict(perturb(model.state_dict(), torch.Generator().manual_seed(1)))
    spec = MergeSpec.from_model(model)
    element = random_element(spec, torch.Generator().manual_seed(2), permutations_only=True)
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **apply_element(model_tensors(model), spec, element)})
    merged = hf_zipit.merge({"a": model, "b": other}, method="weights", refit=None)
    assert {entry["module"] for entry in merged.config.entries} == entered
    images = torch.randn(1, 3, 32, 32)
    for task, expert in {"a": model, "b": other}.items():
        with torch.no_grad():
            expected, found = expert(images, return_dict=False)[0], merged(images, task=task).to_tuple()[0]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
