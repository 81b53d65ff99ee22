"""Rotary embeddings as the model classes write them: found, proven, and all that is right."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.proof import TOLERANCE
from hf_zipit.symmetry.spec import Symmetry, product_key, products
from tests import tiny
from tests.symmetry.checks import BROKEN, next_symmetries, with_symmetry, worst_error

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

ROTATED = {
    "mistral": tiny.of(T.MistralForCausalLM, T.MistralConfig, **tiny.DECODER),
    "qwen2, biases": tiny.of(T.Qwen2ForCausalLM, T.Qwen2Config, **tiny.DECODER),
    "gemma": tiny.of(T.GemmaForCausalLM, T.GemmaConfig, **tiny.DECODER, head_dim=8),
    "olmo": tiny.of(T.OlmoForCausalLM, T.OlmoConfig, **tiny.DECODER),
    "smollm3": tiny.of(T.SmolLM3ForCausalLM, T.SmolLM3Config, **tiny.DECODER, pad_token_id=0),
    "llama, eager": tiny.of(T.LlamaForCausalLM, T.LlamaConfig, **tiny.DECODER, attn_implementation="eager"),
    "modernbert, fused": tiny.of(T.ModernBertForMaskedLM, T.ModernBertConfig, **tiny.TEXT, **TOKENS),
    "esm, scaled before": tiny.of(
        T.EsmForMaskedLM, T.EsmConfig, **tiny.TEXT, position_embedding_type="rotary", pad_token_id=1, mask_token_id=2
    ),
    "phi3, fused and sliced": tiny.EVERYTHING["phi3"],
    "dinov3, patches only": tiny.of(T.DINOv3ViTModel, T.DINOv3ViTConfig, **tiny.IMAGE),
}
PARTLY_ROTATED = {
    "stablelm": tiny.of(T.StableLmForCausalLM, T.StableLmConfig, **tiny.DECODER),
    "gpt-neox, fused": tiny.EVERYTHING["gpt-neox"],
    "phi": tiny.of(T.PhiForCausalLM, T.PhiConfig, **tiny.TEXT),
}
FIXED = {
    "cohere, neighbours": tiny.of(T.CohereForCausalLM, T.CohereConfig, **tiny.DECODER),
}


def traced(builder):
    torch.manual_seed(0)
    model = builder()
    return model, MergeSpec.from_model(model)


def rotary_spaces(spec):
    return [space for space in spec.spaces.values() if space.symmetry is Symmetry.ROTARY]


@pytest.mark.parametrize("name", ROTATED)
def test_pairs_can_be_rotated_and_no_more(name):
    model, spec = traced(ROTATED[name])
    first, _ = rotary_spaces(spec)  # one a layer
    assert (first.size, len(first.within)) == (8, 1)
    assert worst_error(model, spec) <= TOLERANCE
    for more in next_symmetries(first):
        assert worst_error(model, with_symmetry(spec, first.name, more)) > BROKEN


@pytest.mark.parametrize("name", PARTLY_ROTATED)
def test_what_is_left_beside_the_pairs_of_a_head_is_free(name):
    model, spec = traced(PARTLY_ROTATED[name])
    first, _ = rotary_spaces(spec)
    labels = [label for labels in spec.axes.values() for label in labels if first.name in product_key(label)]
    parts = [spec.spaces[product_key(product)[-1]] for product in products(labels[0])]
    (rest,) = [parts[i + 1] for i, part in enumerate(parts[:2]) if part == first]
    assert (first.size + rest.size, rest.symmetry, rest.within) == (8, Symmetry.LINEAR, first.within)
    assert worst_error(model, spec) <= TOLERANCE
    for more in next_symmetries(first):
        assert worst_error(model, with_symmetry(spec, first.name, more)) > BROKEN


@pytest.mark.parametrize("name", FIXED)
def test_what_is_not_known_is_fixed(name):
    model, spec = traced(FIXED[name])
    assert rotary_spaces(spec) == []
    assert worst_error(model, spec) <= TOLERANCE
