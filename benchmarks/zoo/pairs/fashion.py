"""`fashion-vit` and `fashion-resnet`: Fashion-MNIST, five classes each, by ViT (pre-LN) and by ResNet (BatchNorm).

The test split is the data set's own; validation is held out of its training images.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.zoo.pair import Metric, Splits, Tensors, rows
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import fashion_mnist

CLASSES = {"a": fashion_mnist.CLASSES[:5], "b": fashion_mnist.CLASSES[5:]}
FIRST = {"a": 0, "b": 5}
VALIDATION = 2500
SHIFT = 2  # pixels


def half(split: str, task: str) -> tuple[Tensor, Tensor]:
    """The images `[n, 28, 28]` of a task's classes and their labels, 0 to 4."""
    pixels, labels = fashion_mnist.images(split)
    chosen = (labels >= FIRST[task]) & (labels < FIRST[task] + len(CLASSES[task]))
    return pixels[chosen], labels[chosen] - FIRST[task]


def flip_and_shift(pixels: Tensor, generator: Generator) -> Tensor:
    """Mirror every other image at random and `shift` each; `[n, 1, height, width]`."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    return shift(torch.where(mirrored, pixels.flip(-1), pixels), generator)


def shift(pixels: Tensor, generator: Generator) -> Tensor:
    """Move each image at random by up to `SHIFT` pixels either way; `[n, 1, height, width]`."""
    n, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, [SHIFT] * 4, value=float(pixels.min()))
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=generator)
    down, across = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


class Fashion(Recipe):
    """What both pairs share."""

    def splits(self, tokenizer: None) -> Splits:
        found: Splits = {}
        for task in CLASSES:
            pixels, labels = half("train", task)
            data = {"pixel_values": fashion_mnist.normalise(pixels), "labels": labels}
            parts = split_indices(len(labels), VALIDATION, 0, seed=0)
            pixels, labels = half("test", task)
            found[task] = {split: rows(data, parts[split]) for split in ("train", "validation")}
            found[task]["test"] = {"pixel_values": fashion_mnist.normalise(pixels), "labels": labels}
        return found

    def metric(self, tokenizer: None) -> Metric:
        return Metric("accuracy", classes=CLASSES)

    def untrained(self, task: str, tokenizer: None) -> PreTrainedModel:
        names = dict(enumerate(CLASSES[task]))
        return self.model_class(self.config(id2label=names, label2id={name: i for i, name in names.items()}))

    def config(self, **labels: dict) -> PretrainedConfig:
        raise NotImplementedError


class FashionViT(Fashion):
    name = "fashion-vit"
    about = "ViT (pre-LN), Fashion-MNIST, 5 + 5 classes"
    model_class = ViTForImageClassification
    schedule = Schedule(epochs=5, batch_size=128, learning_rate=1e-3, weight_decay=0.05)
    seeds = {"a": 1, "b": 2}

    def config(self, **labels: dict) -> ViTConfig:
        return ViTConfig(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=28,
            patch_size=4,
            num_channels=1,
            **labels,
        )

    def augment(self, batch: Tensors, tokenizer: None, generator: Generator) -> Tensors:
        return batch | {"pixel_values": flip_and_shift(batch["pixel_values"], generator)}


class FashionResNet(Fashion):
    name = "fashion-resnet"
    about = "ResNet (BatchNorm, basic blocks), Fashion-MNIST, 5 + 5 classes"
    model_class = ResNetForImageClassification
    schedule = Schedule(epochs=4, batch_size=128, learning_rate=0.2, weight_decay=5e-4, optimizer="sgd")
    seeds = {"a": 21, "b": 22}

    def config(self, **labels: dict) -> ResNetConfig:
        return ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[2, 2, 2],
            layer_type="basic",
            **labels,
        )
