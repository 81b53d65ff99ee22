"""Rotary embeddings as the model classes write them: found, proven, and all that is right."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.proof import TOLERANCE
from hf_zipit.symmetry.rules.rotary import NUMBERED_PAIRS
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
    "gpt-oss, halves by themselves": tiny.of(
        T.GptOssForCausalLM,
        T.GptOssConfig,
        **tiny.DECODER,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
        num_experts_per_tok=1,
    ),
    "dinov3, patches only": tiny.of(T.DINOv3ViTModel, T.DINOv3ViTConfig, **tiny.IMAGE),
}
PARTLY_ROTATED = {
    "stablelm": tiny.of(T.StableLmForCausalLM, T.StableLmConfig, **tiny.DECODER),
    "gpt-neox, fused": tiny.EVERYTHING["gpt-neox"],
    "phi": tiny.of(T.PhiForCausalLM, T.PhiConfig, **tiny.TEXT),
}
NEIGHBOURS = {
    "cohere": tiny.of(T.CohereForCausalLM, T.CohereConfig, **tiny.DECODER),
    "glm, partial": tiny.of(T.GlmForCausalLM, T.GlmConfig, **tiny.DECODER, head_dim=8, pad_token_id=0),
    "llama4, complex": tiny.of(T.Llama4ForCausalLM, T.Llama4TextConfig, **tiny.DECODER, pad_token_id=0),
}
SCALED = {
    "qwen3": tiny.of(T.Qwen3ForCausalLM, T.Qwen3Config, **tiny.DECODER, head_dim=8),
    "gemma3, one more": tiny.of(T.Gemma3ForCausalLM, T.Gemma3TextConfig, **tiny.DECODER, head_dim=8),
    "olmo2, all heads": tiny.of(T.Olmo2ForCausalLM, T.Olmo2Config, **tiny.DECODER),
    "hunyuan, after": tiny.of(T.HunYuanDenseV1ForCausalLM, T.HunYuanDenseV1Config, **tiny.DECODER, head_dim=8),
}


DEEPSEEK = tiny.of(
    T.DeepseekV3ForCausalLM, T.DeepseekV3Config, **tiny.TEXT, first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8,
    qk_rope_head_dim=8, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4, pad_token_id=0,
)  # fmt: skip


def traced(builder):
    torch.manual_seed(0)
    model = builder()
    return model, MergeSpec.from_model(model)


def rotary_spaces(spec):
    return [space for space in spec.spaces.values() if space.symmetry is Symmetry.ROTARY]


@pytest.mark.parametrize("name", tiny.mostly_seldom(ROTATED, 2))
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


@pytest.mark.parametrize("name", [*NEIGHBOURS, *SCALED])
def test_neighbours_are_rotated_and_scaled_pairs_change_their_signs(name):
    model, spec = traced((NEIGHBOURS | SCALED)[name])
    expected = Symmetry.ROTARY_NEIGHBOURS if name in NEIGHBOURS else Symmetry.HALF_TURNS
    turned = [space for space in spec.spaces.values() if space.symmetry.in_pairs]
    assert {space.symmetry for space in turned} == {expected}
    assert len(turned) == model.config.num_hidden_layers and all(len(space.within) == 1 for space in turned)
    assert worst_error(model, spec) <= TOLERANCE
    for more in next_symmetries(turned[0]):
        assert worst_error(model, with_symmetry(spec, turned[0].name, more)) > BROKEN


def test_neighbours_that_come_out_as_halves_are_rotated_pair_by_pair():
    model, spec = traced(DEEPSEEK)
    first, _ = rotary_spaces(spec)  # the two units of every pair, of all heads: their key has none
    (pairs,) = (spec.spaces[name] for name in first.within)
    assert (first.size, pairs.size, pairs.frozen_by) == (2, 4, NUMBERED_PAIRS)
    assert worst_error(model, spec) <= TOLERANCE
    for more in next_symmetries(first):
        assert worst_error(model, with_symmetry(spec, first.name, more)) > BROKEN
    assert worst_error(model, with_symmetry(spec, pairs.name, Symmetry.PERMUTATION)) > BROKEN
