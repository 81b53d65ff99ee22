"""Random architectures merged by random settings hold the invariants of every merge; `HF_ZIPIT_FUZZ` asks for 1,000.

A case is drawn from its seed alone. Copies of one expert, reordered ones too where the method looks for that, give it
back; different experts give finite outputs and every task its own labels; what is saved is what is loaded. Settings
that do not go together are refused in one sentence.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.errors import ZipItError
from hf_zipit.registry import METHODS
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors

from ..test_invariants import (
    assert_bit_identical,
    assert_same,
    awake,
    calibration,
    in_general_position,
    outputs,
    with_tensors,
)
from .killing import EVERYTHING

TASKS = "abcde"
ACTIVATIONS = ("gelu", "relu", "silu", "gelu_new", "tanh")
CORRECTIONS = ([], ["repair"], ["batchnorm-reset"], ["rescale-shift"], ["repair", "batchnorm-reset", "rescale-shift"])

Built = tuple[type[PreTrainedModel], T.PreTrainedConfig]


def sizes(draw: random.Random) -> dict[str, Any]:
    """Of a transformer."""
    heads = draw.randint(1, 4)
    return {
        "num_attention_heads": heads,
        "hidden_size": max(4, heads * 2 * draw.randint(1, 4)),  # norms make of two units a single bit
        "intermediate_size": draw.randint(5, 40),
        "num_hidden_layers": draw.randint(1, 3),
        "hidden_act": draw.choice(ACTIVATIONS),
    }


def vision(draw: random.Random) -> dict[str, Any]:
    patch = draw.choice((2, 4))
    return {**sizes(draw), "patch_size": patch, "image_size": patch * draw.randint(1, 3)}


def text(draw: random.Random) -> dict[str, Any]:
    return {**sizes(draw), "vocab_size": draw.randint(20, 50), "max_position_embeddings": draw.randint(12, 24)}


def bert(draw: random.Random) -> Built:
    kinds = (T.BertModel, T.BertForMaskedLM, T.BertForSequenceClassification, T.BertForTokenClassification)
    return draw.choice(kinds), T.BertConfig(**text(draw), type_vocab_size=draw.randint(1, 3))


def vit(draw: random.Random) -> Built:
    config = T.ViTConfig(**vision(draw), num_channels=draw.choice((1, 3)), qkv_bias=draw.random() < 0.5)
    return draw.choice((T.ViTModel, T.ViTForImageClassification)), config


def resnet(draw: random.Random) -> Built:
    stages = draw.randint(1, 3)
    config = T.ResNetConfig(
        embedding_size=4 * draw.randint(1, 3), hidden_sizes=[4 * draw.randint(1, 4) for _ in range(stages)],
        depths=[draw.randint(1, 2) for _ in range(stages)], layer_type=draw.choice(("basic", "bottleneck")),
        hidden_act=draw.choice(("relu", "gelu", "silu")), downsample_in_first_stage=draw.random() < 0.5,
    )  # fmt: skip
    return draw.choice((T.ResNetModel, T.ResNetForImageClassification)), config


def clip(draw: random.Random) -> Built:
    parts = {"text_config": {**text(draw), "eos_token_id": 2}, "vision_config": vision(draw)}
    kind = draw.choice((T.CLIPModel, T.CLIPForImageClassification))
    return kind, T.CLIPConfig(**parts, projection_dim=draw.randint(4, 16))


def llama(draw: random.Random) -> Built:
    found = text(draw)
    heads = found["num_attention_heads"]
    config = T.LlamaConfig(
        **found, num_key_value_heads=draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        attention_bias=draw.random() < 0.5, mlp_bias=draw.random() < 0.5, tie_word_embeddings=draw.random() < 0.5,
    )  # fmt: skip
    return T.LlamaForCausalLM, config


FAMILIES: tuple[Callable[[random.Random], Built], ...] = (bert, vit, resnet, clip, llama)


def experts(draw: random.Random, method: str, copies: bool) -> dict[str, PreTrainedModel]:
    """Two to five of one random architecture: of different initialisation and numbers of labels, or copies."""
    kind, config = draw.choice(FAMILIES)(draw)
    count, generator = draw.randint(2, len(TASKS)), torch.Generator().manual_seed(draw.randrange(2**31))
    labelled = "Classification" in kind.__name__

    def new(number: int) -> PreTrainedModel:
        classes = draw.randint(2, 5)
        if labelled:
            config.id2label = {i: f"{TASKS[number]}{i}" for i in range(classes)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.randrange(2**31))
            return awake(in_general_position(kind(type(config)(**config.to_dict())).eval(), generator))

    moved = bool(METHODS.get(method).needs)
    if not copies:
        return {TASKS[number]: new(number) for number in range(count)}
    first = new(0)
    spec = MergeSpec.from_model(first)

    def copy() -> PreTrainedModel:
        tensors = model_tensors(first)
        if moved:
            tensors = apply_element(tensors, spec, random_element(spec, generator, True))
        return with_tensors(first, tensors)

    return {TASKS[number]: copy() for number in range(count)}


def settings(draw: random.Random) -> dict[str, Any]:
    return {
        "method": draw.choice(METHODS.names()),
        "depth": draw.choice((0.0, 0.3, 0.5, 1.0, 1.0)),
        "refit": draw.random() < 0.4,
        "corrections": draw.choice((*CORRECTIONS[:1] * 3, *CORRECTIONS)),
    }


def tolerance(chosen: Mapping[str, Any]) -> float:
    """Of copies given back, relative: a refit and corrections estimate what is exact without them."""
    return 2e-2 if chosen["refit"] or chosen["corrections"] else 1e-4


@pytest.mark.parametrize("seed", range(1000) if EVERYTHING else (2, 3, 876))
def test_a_random_architecture_holds_the_invariants(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    chosen, copies = settings(draw), draw.random() < 0.5
    models = experts(draw, chosen["method"], copies)
    first = models["a"]
    inputs = calibration(first)
    try:
        merged = merge(models, dict(inputs), **chosen)
    except ZipItError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        pytest.skip(f"refused: {error}")
    resets = "batchnorm-reset" in chosen["corrections"] and any(isinstance(m, nn.BatchNorm2d) for m in first.modules())
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert_bit_identical(dict(loaded.state_dict()), dict(merged.state_dict()))
    for task, model in models.items():
        found = outputs(merged, inputs, model, task=task)
        assert all(bool(tensor.isfinite().all()) for tensor in found.values())
        assert_bit_identical(outputs(loaded, inputs, model, task=task), found)
        if labels := merged.config.labels_of(task):
            assert labels == model.config.id2label
        if copies and not resets:
            assert_same(found, outputs(model, inputs, model), tolerance(chosen))


MANY: dict[str, dict[str, Any]] = {
    "average": {"method": "identity", "refit": False},
    "zip": {"method": "zip", "refit": False},
    "weights": {"method": "weights", "refit": False},
    "permute and refit": {"method": "permute", "refit": True},
}


@pytest.mark.parametrize("name", MANY if EVERYTHING else ["average"])
def test_many_tasks(name: str) -> None:
    """100 of them in `make fuzz`."""
    count, chosen = 100 if EVERYTHING else 10, MANY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T.ViTConfig(**vision(random.Random(0)), num_channels=1)
        models = {f"task {n}": T.ViTForImageClassification(config).eval() for n in range(count)}
    inputs, start = calibration(models["task 0"]), time.process_time()
    merged = merge(models, dict(inputs), **chosen)
    print(f"{count} tasks, {name}: {time.process_time() - start:.0f} s of CPU")
    assert merged.config.tasks == list(models)
    assert outputs(merged, inputs, models["task 0"])["logits"].shape[-1] == 2 * count
    assert outputs(merged, inputs, models["task 0"], task=f"task {count - 1}")["logits"].isfinite().all()
