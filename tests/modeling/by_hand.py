"""Tiny experts of several families, and merged models put together by hand: one expert's trunk, each one's branch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_zipit.modeling import ZipItConfig, ZipItPreTrainedModel, build

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SIZES | {"vocab_size": 40, "max_position_embeddings": 16}
VISION = SIZES | {"image_size": 16, "patch_size": 4}
CLIP = {
    "text_config": TEXT | {"bos_token_id": 0, "eos_token_id": 39, "pad_token_id": 1},
    "vision_config": VISION,
    "projection_dim": 16,
}
LABELS = {"clothes": ["shirt", "coat", "bag"], "shoes": ["boot", "sandal"], "hats": ["cap", "beret", "top", "none"]}


@dataclass(frozen=True)
class Family:
    """A source class, how to configure it, and what a trunk of half its blocks and of all its blocks is."""

    model: type[PreTrainedModel]
    config: Callable[..., object]
    part: tuple[str, ...]
    whole: tuple[str, ...]
    inputs: tuple[str, ...]
    labelled: bool = True


FAMILIES = {
    "vit": Family(
        ViTForImageClassification,
        lambda **k: ViTConfig(**VISION, **k),
        ("vit.embeddings", "vit.layers.0"),
        ("vit",),
        ("pixel_values",),
    ),
    "resnet": Family(
        ResNetForImageClassification,
        lambda **k: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", **k),
        ("resnet.embedder", "resnet.encoder.stages.0"),
        ("resnet",),
        ("pixel_values",),
    ),
    "clip-classifier": Family(
        CLIPForImageClassification,
        lambda **k: CLIPConfig(**CLIP, **k),
        ("vision_model.embeddings", "vision_model.pre_layrnorm", "vision_model.encoder.layers.0"),
        ("vision_model",),
        ("pixel_values",),
    ),
    "bert": Family(
        BertForSequenceClassification,
        lambda **k: BertConfig(**TEXT, **k),
        ("bert.embeddings", "bert.encoder.layer.0"),
        ("bert",),
        ("input_ids", "attention_mask"),
    ),
    "bert-tokens": Family(
        BertForTokenClassification,
        lambda **k: BertConfig(**TEXT, **k),
        ("bert.embeddings", "bert.encoder.layer.0"),
        ("bert",),
        ("input_ids", "attention_mask"),
    ),
    "bert-lm": Family(
        BertForMaskedLM,
        lambda **k: BertConfig(**TEXT, **k),
        ("bert.embeddings", "bert.encoder.layer.0"),
        ("bert",),
        ("input_ids", "attention_mask"),
        labelled=False,
    ),
    "bert-features": Family(
        BertModel,
        lambda **k: BertConfig(**TEXT, **k),
        ("embeddings", "encoder.layer.0"),
        ("",),
        ("input_ids", "attention_mask"),
        labelled=False,
    ),
    "clip": Family(
        CLIPModel,
        lambda **k: CLIPConfig(**CLIP, **k),
        (
            "vision_model.embeddings",
            "vision_model.pre_layrnorm",
            "vision_model.encoder.layers.0",
            "text_model.embeddings",
        ),
        ("vision_model", "text_model"),
        ("input_ids", "attention_mask", "pixel_values"),
        labelled=False,
    ),
}


def make_expert(family: str, seed: int, labels: list[str] | None = None) -> PreTrainedModel:
    """A model in which no tensor is a constant, so that nothing holds by accident."""
    torch.manual_seed(seed)
    kind = FAMILIES[family]
    names = dict(enumerate(labels)) if labels and kind.labelled else None
    settings = {"id2label": names, "label2id": {name: key for key, name in names.items()}} if names else {}
    model = kind.model(kind.config(**settings)).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def make_experts(family: str, shared: tuple[str, ...] = (), tasks: int = 2) -> dict[str, PreTrainedModel]:
    """Experts of different seeds and labels that agree in the shared modules, as if those were merged perfectly."""
    experts = {
        task: make_expert(family, seed, labels) for seed, (task, labels) in enumerate(list(LABELS.items())[:tasks])
    }
    first, *others = experts.values()
    for other in others:
        for path in shared:
            other.get_submodule(path).load_state_dict(first.get_submodule(path).state_dict())
    return experts


def hand_config(experts: dict[str, PreTrainedModel], shared: tuple[str, ...] = (), **settings: object) -> ZipItConfig:
    first = next(iter(experts.values()))
    labelled = type(first).__name__.endswith("Classification")
    return ZipItConfig(
        source_architecture=type(first).__name__,
        source_config=first.config,
        tasks=list(experts),
        task_labels={task: expert.config.id2label for task, expert in experts.items()} if labelled else None,
        shared=list(shared),
        **settings,
    )


def merge_by_hand(
    experts: dict[str, PreTrainedModel],
    shared: tuple[str, ...] = (),
    tensors: dict[str, Tensor] | None = None,
    **settings: object,
) -> ZipItPreTrainedModel:
    """A merged model with the first expert's tensors in the trunk and each expert's own in its branch."""
    model = build(hand_config(experts, shared, **settings)).eval()
    first = next(iter(experts.values()))
    found = {f"trunk.{name}": value for name, value in first.state_dict().items()}
    for task, expert in experts.items():
        key = model.branch_names[task]
        found |= {f"branches.{key}.{name}": value for name, value in expert.state_dict().items()}
    own = model.state_dict()
    found = {name: found.get(name, own[name]) for name in own} | (tensors or {})
    model.load_state_dict(copy.deepcopy(found), strict=True)
    return model


def make_inputs(family: str, batch: int = 3, seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    mask = torch.ones(batch, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    values = {
        "pixel_values": torch.randn(batch, 3, 16, 16),
        "input_ids": torch.randint(2, 39, (batch, 6)).index_fill(1, torch.tensor([3]), 39),
        "attention_mask": mask,
    }
    return {name: values[name] for name in FAMILIES[family].inputs}
