"""Reordered copies of one expert give it back, however many, also where part of what tells units apart is missing."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors

from ..test_invariants import assert_same, calibration, in_general_position, outputs, with_tensors

TOLERANCE = 1e-4


def llama(**settings: object) -> PreTrainedModel:
    sizes = {"vocab_size": 25, "num_hidden_layers": 2, "intermediate_size": 10, "max_position_embeddings": 16}
    return T.LlamaForCausalLM(T.LlamaConfig(**{**sizes, **settings}))


def vit(**settings: object) -> PreTrainedModel:
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "intermediate_size": 20}
    return T.ViTForImageClassification(T.ViTConfig(**{**sizes, **settings}))


def copies(model: PreTrainedModel, count: int) -> dict[str, PreTrainedModel]:
    generator = torch.Generator().manual_seed(1)
    model = in_general_position(model.eval(), generator)
    spec, tensors = MergeSpec.from_model(model), model_tensors(model)
    moved = (apply_element(tensors, spec, random_element(spec, generator, True)) for _ in range(count - 1))
    return dict(zip("abcde", (model, *(with_tensors(model, found) for found in moved)), strict=False))


CASES = {
    "queries of a single group": (
        "circuits", lambda: llama(hidden_size=6, num_attention_heads=3, num_key_value_heads=1, head_dim=2),
    ),
    "fewer words than units": (
        "circuits", lambda: llama(hidden_size=32, num_attention_heads=4, tie_word_embeddings=True),
    ),
    "a direction that norms keep from varying": (
        "cca", lambda: vit(hidden_size=4, num_attention_heads=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_copies_give_the_expert_back(name: str, count: int) -> None:
    method, build = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = copies(build(), count)
    inputs = calibration(models["a"])
    merged = merge(models, dict(inputs), method=method, refit=False, corrections=[])
    for task, model in models.items():
        assert_same(outputs(merged, inputs, model, task=task), outputs(model, inputs, model), TOLERANCE)
