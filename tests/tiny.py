"""Tiny random models: the one table that every generic test of the project runs over.

`REQUIRED` holds the classes that hf_zipit promises to merge, `EXTRA` classes that no adapter names, which go through
the `auto` adapter. A builder takes no argument of its own; `build` seeds it, so that a model is made the same way
everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "image_size": 16, "patch_size": 4}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 50, "max_position_embeddings": 20}  # fmt: skip
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50, "max_position_embeddings": 20}
DECODER = {**TEXT, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20}
CLIP = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 24}
BASIC = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
BOTTLENECK = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "bottleneck"}
REGNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "groups_width": 4, "layer_type": "y"}
POOLFORMER = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
              "strides": [4, 2], "padding": [2, 1], "image_size": 32}  # fmt: skip
SEGFORMER = {"hidden_sizes": [8, 16, 32, 64], "image_size": 32, "num_attention_heads": [1, 2, 4, 8]}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 32}
BIT = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8}
WAV2VEC2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}  # fmt: skip
BART = {"d_model": 32, "vocab_size": 50, "max_position_embeddings": 20,
        "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}  # fmt: skip
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

Builder = Callable[..., PreTrainedModel]


def of(model_class: type[PreTrainedModel], config_class: type[T.PreTrainedConfig], **settings: Any) -> Builder:
    """A builder of one class; keyword arguments of its call go over its settings."""

    def builder(**more: Any) -> PreTrainedModel:
        return model_class(config_class(**{**settings, **more})).eval()

    return builder


def clip_part(model_class: type[PreTrainedModel], part: str) -> Builder:
    def builder(**more: Any) -> PreTrainedModel:
        return model_class(getattr(T.CLIPConfig(**{**CLIP, **more}), part)).eval()

    return builder


REQUIRED: dict[str, Builder] = {
    "vit": of(T.ViTForImageClassification, T.ViTConfig, **IMAGE),
    "vit-eager": of(T.ViTForImageClassification, T.ViTConfig, **IMAGE, attn_implementation="eager"),
    "vit-features": of(T.ViTModel, T.ViTConfig, **IMAGE),
    "vit-features-eager": of(T.ViTModel, T.ViTConfig, **IMAGE, attn_implementation="eager"),
    "clip": of(T.CLIPModel, T.CLIPConfig, **CLIP),
    "clip-vision": clip_part(T.CLIPVisionModelWithProjection, "vision_config"),
    "clip-text": clip_part(T.CLIPTextModelWithProjection, "text_config"),
    "clip-image": of(T.CLIPForImageClassification, T.CLIPConfig, **CLIP),
    "bert": of(T.BertModel, T.BertConfig, **TEXT),
    "bert-masked": of(T.BertForMaskedLM, T.BertConfig, **TEXT),
    "bert-sequence": of(T.BertForSequenceClassification, T.BertConfig, **TEXT),
    "bert-token": of(T.BertForTokenClassification, T.BertConfig, **TEXT),
    "roberta-masked": of(T.RobertaForMaskedLM, T.RobertaConfig, **TEXT),
    "roberta-sequence": of(T.RobertaForSequenceClassification, T.RobertaConfig, **TEXT),
    "roberta-prelayernorm": of(T.RobertaPreLayerNormForMaskedLM, T.RobertaPreLayerNormConfig, **TEXT),
    "distilbert-masked": of(T.DistilBertForMaskedLM, T.DistilBertConfig, **DISTIL),
    "distilbert-sequence": of(T.DistilBertForSequenceClassification, T.DistilBertConfig, **DISTIL),
    "resnet-basic": of(T.ResNetForImageClassification, T.ResNetConfig, **BASIC),
    "resnet-bottleneck": of(T.ResNetForImageClassification, T.ResNetConfig, **BOTTLENECK),
}
"""The classes that hf_zipit promises to merge."""

EXTRA: dict[str, Builder] = {
    "deit": of(T.DeiTForImageClassification, T.DeiTConfig, **IMAGE),
    "dinov2": of(T.Dinov2ForImageClassification, T.Dinov2Config, **IMAGE),
    "beit": of(T.BeitForImageClassification, T.BeitConfig, **IMAGE),
    "siglip-vision": of(T.SiglipVisionModel, T.SiglipVisionConfig, **IMAGE),
    "convnext": of(T.ConvNextForImageClassification, T.ConvNextConfig, **CONVNEXT),
    "electra": of(T.ElectraForSequenceClassification, T.ElectraConfig, **TEXT, embedding_size=16),
    "albert": of(T.AlbertForSequenceClassification, T.AlbertConfig, **TEXT, embedding_size=16),
    "mpnet": of(T.MPNetForSequenceClassification, T.MPNetConfig, **TEXT),
    "deberta-v2": of(T.DebertaV2ForSequenceClassification, T.DebertaV2Config, **TEXT, **DISENTANGLED),
    "regnet": of(T.RegNetForImageClassification, T.RegNetConfig, **REGNET),
    "mobilenet-v2": of(T.MobileNetV2ForImageClassification, T.MobileNetV2Config, depth_multiplier=0.25, image_size=32),
    "bit": of(T.BitForImageClassification, T.BitConfig, **BIT),
    "poolformer": of(T.PoolFormerForImageClassification, T.PoolFormerConfig, **POOLFORMER),
    "segformer": of(T.SegformerForImageClassification, T.SegformerConfig, **SEGFORMER),
    "llama": of(T.LlamaForCausalLM, T.LlamaConfig, **DECODER),
    "qwen3": of(T.Qwen3ForCausalLM, T.Qwen3Config, **DECODER, head_dim=8),
    "wav2vec2": of(T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config, **WAV2VEC2),
    "hubert-stable": of(
        T.HubertForSequenceClassification,
        T.HubertConfig,
        **WAV2VEC2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    ),
    "phi3": of(T.Phi3ForCausalLM, T.Phi3Config, **DECODER, pad_token_id=0),
    "gpt-neox": of(T.GPTNeoXForCausalLM, T.GPTNeoXConfig, **TEXT),
    "gpt2": of(T.GPT2LMHeadModel, T.GPT2Config, **GPT),
    "bart": of(T.BartForConditionalGeneration, T.BartConfig, **BART),
    "mixtral": of(T.MixtralForCausalLM, T.MixtralConfig, **DECODER, num_local_experts=5),
}
"""Classes that no adapter of the project was written for (but for DeiT and ELECTRA, which share one)."""

EVERYTHING: dict[str, Builder] = {**REQUIRED, **EXTRA}


SAME_TRUNKS = (
    "vit-eager", "vit-features", "vit-features-eager", "clip-vision", "clip-text", "clip-image", "bert", "bert-token",
    "roberta-sequence", "distilbert-sequence", "deit",
)  # fmt: skip
"""What another class of the tables is but for its head, or for the op that attention is written in."""

TRUNKS = tuple(name for name in EVERYTHING if name not in SAME_TRUNKS)
"""One class for every kind of trunk."""


seldom = pytest.mark.skip(reason="the same code as for others; runs where HF_ZIPIT_FUZZ is set")


def mostly_seldom(cases: Iterable[Any], every: int = 3, always: Collection[Any] = ()) -> Iterator[Any]:
    """The cases of a test; all but one in so many, and some named ones, only run where there is time (`make fuzz`)."""
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        runs = os.environ.get("HF_ZIPIT_FUZZ") or case in always or (every and number % every == 0)
        yield pytest.param(*values, marks=() if runs else seldom)


def build(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model of either table in eval mode; `settings` are added to its configuration (`num_labels=3`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EVERYTHING[name](**settings)


def is_classifier(name: str) -> bool:
    """Whether a model of the table has classes, so that experts may differ in how many."""
    return type(build(name)).__name__.endswith("Classification")


def pair(name: str, seeds: Sequence[int] = (0, 1), labels: Sequence[int] = (3, 4)) -> tuple[PreTrainedModel, ...]:
    """Experts of different initialisation and, where the class has a classifier, of different numbers of labels."""
    if not is_classifier(name):
        return tuple(build(name, seed) for seed in seeds)
    return tuple(build(name, seed, num_labels=n) for seed, n in zip(seeds, labels, strict=True))
