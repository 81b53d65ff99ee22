"""`segmentation` and `detection`: SegFormer and YOLOS on scenes of garments, 5 + 5 classes. Hard pairs.

A scene for segmentation is crowded: nine of Fashion-MNIST's garments that hide a part of one another, and every place
is asked for its garment's class or the ground. A scene for detection has two to four with some distance, and every one
is asked for its class and box. Garments of test scenes are those of the data set's test split; garments of validation
scenes are held out of its training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    YolosConfig,
    YolosForObjectDetection,
)

from benchmarks.zoo.boxes import Detection
from benchmarks.zoo.pair import IGNORED, Metric, Splits, Tensors
from benchmarks.zoo.pairs.fashion import CLASSES, VALIDATION, half
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import scenes
from benchmarks.zoo.sources.fashion_mnist import normalise

SAMPLES = {"train": 12_000, "validation": 500, "test": 500}
FREE = scenes.SIDE - scenes.THING
STRIDE = 4  # pixels between the places at which SegFormer answers
CORNERS = torch.cartesian_prod(torch.tensor([0, FREE]), torch.tensor([0, FREE]))
GRID = torch.cartesian_prod(torch.tensor([0, FREE // 2, FREE]), torch.tensor([0, FREE // 2, FREE]))
JITTER = 5  # pixels


class Segmentation(Recipe):
    name = "segmentation"
    about = "SegFormer, garments of crowded scenes, 5 + 5 classes and the ground"
    model_class = SegformerForSemanticSegmentation
    schedule = Schedule(epochs=2, batch_size=16, learning_rate=2e-3, weight_decay=0.01)
    seeds: Mapping[str, int] = {"a": 131, "b": 132}

    def splits(self, tokenizer: PreTrainedTokenizerBase | None) -> Splits:
        return {task: {split: _crowded(task, split) for split in SAMPLES} for task in self.seeds}

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
        names = dict(enumerate((*CLASSES[task], "ground")))
        return SegformerForSemanticSegmentation(
            SegformerConfig(
                num_channels=1,
                depths=[2, 2, 2, 2],
                hidden_sizes=[32, 64, 96, 128],
                num_attention_heads=[1, 2, 3, 4],
                mlp_ratios=[2, 2, 2, 2],
                sr_ratios=[4, 2, 1, 1],
                decoder_hidden_size=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                classifier_dropout_prob=0.0,
                drop_path_rate=0.0,
                id2label=names,
                label2id={name: i for i, name in names.items()},
            )
        )

    def metric(self, tokenizer: PreTrainedTokenizerBase | None) -> Metric:
        classes = {task: (*names, "ground") for task, names in CLASSES.items()}
        return Metric("pixel accuracy", axis=1, classes=classes, joint=False)

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        return cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])


class Objects(Recipe):
    name = "detection"
    about = "YOLOS, garments of scenes and their boxes, 5 + 5 classes"
    model_class = YolosForObjectDetection
    schedule = Schedule(epochs=5, batch_size=32, learning_rate=1e-3, weight_decay=0.01)
    seeds: Mapping[str, int] = {"a": 141, "b": 142}

    def splits(self, tokenizer: PreTrainedTokenizerBase | None) -> Splits:
        return {task: {split: _spread(task, split) for split in SAMPLES} for task in self.seeds}

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
        names = dict(enumerate(CLASSES[task]))
        return YolosForObjectDetection(
            YolosConfig(
                num_channels=1,
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=256,
                image_size=[scenes.SIDE, scenes.SIDE],
                patch_size=7,
                num_detection_tokens=8,
                use_mid_position_embeddings=False,
                id2label=names,
                label2id={name: i for i, name in names.items()},
            )
        )

    def metric(self, tokenizer: PreTrainedTokenizerBase | None) -> Metric:
        return Detection("found objects", classes=CLASSES, joint=False)

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        wanted: list[dict[str, Any]] = []
        for objects in batch["labels"]:
            there = objects[objects[:, 0] != IGNORED]
            wanted.append({"class_labels": there[:, 0].long(), "boxes": there[:, 1:]})
        return model(batch["pixel_values"], labels=wanted).loss


@cache
def _crowded(task: str, split: str) -> Tensors:
    """Scenes of nine garments, and the class at every place where SegFormer answers."""
    generator = Generator().manual_seed(list(SAMPLES).index(split))
    pixels, labels = _garments(task, split, len(GRID), generator)
    drawn, owners, _ = scenes.composed(pixels, _jittered(GRID, len(labels), generator), generator)
    asked = owners[:, ::STRIDE, ::STRIDE].flatten(1)
    with_ground = torch.cat([labels, torch.full_like(labels[:, :1], len(CLASSES[task]))], 1)  # the last is -1's
    classes = with_ground.gather(1, asked % with_ground.shape[1]).view(len(labels), *[scenes.SIDE // STRIDE] * 2)
    return {"pixel_values": normalise(drawn), "labels": classes}


@cache
def _spread(task: str, split: str) -> Tensors:
    """Scenes of two to four garments; labels are rows of class and box, filled with -100."""
    generator = Generator().manual_seed(10 + list(SAMPLES).index(split))
    pixels, labels = _garments(task, split, len(CORNERS), generator)
    rank, shown = torch.rand(labels.shape, generator=generator).argsort(1), (len(labels), 1)
    absent = rank >= torch.randint(2, len(CORNERS) + 1, shown, generator=generator)
    pixels = pixels.masked_fill(absent[:, :, None, None], 0)
    drawn, _, boxes = scenes.composed(pixels, _jittered(CORNERS, len(labels), generator), generator)
    objects = torch.cat([labels.unsqueeze(2), boxes], 2).masked_fill(absent.unsqueeze(2), IGNORED)
    return {"pixel_values": normalise(drawn), "labels": objects}


def _garments(task: str, split: str, several: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Images `[scenes, several, 28, 28]` of a task's classes, and their labels `[scenes, several]`."""
    pixels, labels = half("test" if split == "test" else "train", task)
    if split != "test":
        index = split_indices(len(labels), VALIDATION, 0, seed=0)[split]
        pixels, labels = pixels[index], labels[index]
    chosen = torch.randint(len(labels), (SAMPLES[split], several), generator=generator)
    return pixels[chosen], labels[chosen]


def _jittered(places: Tensor, count: int, generator: Generator) -> Tensor:
    """Corners `[count, places, 2]` near the given ones, inside the scene."""
    moved = places + torch.randint(-JITTER, JITTER + 1, (count, *places.shape), generator=generator)
    return moved.clamp(0, FREE)
