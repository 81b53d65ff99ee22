"""`many-2` to `many-8`: up to eight ViTs from different initialisations on different tasks of small grey images.

A pair of T tasks is the first T of `TASKS`; all read the same experts, which are trained once. `many-2-narrow` and so
on are the same tasks by ViTs of half the width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase, ViTConfig, ViTForImageClassification

from benchmarks.zoo.pair import Metric, Splits, Tensors
from benchmarks.zoo.pairs.fashion import shift
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import digits, drawings, fashion_mnist

Images = tuple[Tensor, Tensor]  # `[n, 28, 28]`, uint8, and labels `[n]`

COUNTS = {"train": 8000, "validation": 1000, "test": 1000}
WIDTH = 128
TOPS = (0, 2, 3, 4, 6)  # of Fashion-MNIST's classes
OTHERS = (1, 5, 7, 8, 9)
TURNS = ("upright", "left", "upside down", "right")


def some_fashion(wanted: tuple[int, ...]) -> Callable[[str, Generator], Images]:
    """The images of some classes; validation is held out of the data set's training images."""

    def draw(split: str, generator: Generator) -> Images:
        pixels, labels = fashion(split)
        chosen = torch.isin(labels, torch.tensor(wanted)).nonzero().squeeze(1)[: COUNTS[split]]
        return pixels[chosen], torch.searchsorted(torch.tensor(wanted), labels[chosen])

    return draw


def turned_fashion(split: str, generator: Generator) -> Images:
    """Images of all classes, turned by multiples of 90 degrees; the label is the turn."""
    pixels = fashion(split)[0][-COUNTS[split] :]
    labels = torch.randint(len(TURNS), (len(pixels),), generator=generator)
    return torch.stack([image.rot90(turn) for image, turn in zip(pixels, labels.tolist(), strict=True)]), labels


def fashion(split: str) -> Images:
    """Fashion-MNIST's own test split, or a part of its training split."""
    pixels, labels = fashion_mnist.images("test" if split == "test" else "train")
    held_out = 5 * COUNTS["validation"]
    part = {"train": slice(held_out, None), "validation": slice(held_out), "test": slice(None)}[split]
    return pixels[part], labels[part]


def written_digits(split: str, generator: Generator) -> Images:
    """scikit-learn's digits; the few of the training split come several times, which `augment` moves."""
    pixels, labels = digits.images()
    index = split_indices(len(labels), 250, 250, seed=0)[split]
    if split == "train":
        index = index[torch.randint(len(index), (COUNTS[split],), generator=generator)]
    return pixels[index], labels[index]


def drawn(draw: Callable[[int, Generator], Images]) -> Callable[[str, Generator], Images]:
    """A drawing's images by split."""
    return lambda split, generator: draw(COUNTS[split], generator)


TASKS: dict[str, tuple[Callable[[str, Generator], Images], tuple[str, ...]]] = {
    "tops": (some_fashion(TOPS), tuple(fashion_mnist.CLASSES[i] for i in TOPS)),
    "letters": (drawn(drawings.letters), drawings.LETTERS),
    "digits": (written_digits, digits.CLASSES),
    "turns": (turned_fashion, TURNS),
    "shapes": (drawn(drawings.shapes), drawings.SHAPES),
    "others": (some_fashion(OTHERS), tuple(fashion_mnist.CLASSES[i] for i in OTHERS)),
    "dots": (drawn(drawings.dots), drawings.DOTS),
    "stripes": (drawn(drawings.stripes), drawings.ANGLES),
}
"""By name, how the images of a split are drawn, and the names of the classes."""


class Many(Recipe):
    """The first `count` tasks, by experts of a width."""

    model_class = ViTForImageClassification
    schedule = Schedule(epochs=4, batch_size=32, learning_rate=1e-3, weight_decay=0.05)

    def __init__(self, count: int, width: int = WIDTH) -> None:
        narrow = width < WIDTH
        self.name = f"many-{count}" + "-narrow" * narrow
        self.folder = "many" + "-narrow" * narrow
        self.width = width
        self.tasks = tuple(TASKS)[:count]
        self.about = f"ViT (pre-LN{f', width {width}' * narrow}), {count} tasks: {', '.join(self.tasks)}"
        self.seeds = {task: 101 + i for i, task in enumerate(self.tasks)}

    def splits(self, tokenizer: PreTrainedTokenizerBase | None) -> Splits:
        return {task: {split: _data(task, split) for split in COUNTS} for task in self.tasks}

    def metric(self, tokenizer: PreTrainedTokenizerBase | None) -> Metric:
        return Metric("accuracy", classes={task: TASKS[task][1] for task in self.tasks})

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase | None) -> ViTForImageClassification:
        names = dict(enumerate(TASKS[task][1]))
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=self.width,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=4 * self.width,
                image_size=28,
                patch_size=4,
                num_channels=1,
                id2label=names,
                label2id={name: i for i, name in names.items()},
            )
        )

    def augment(self, batch: Tensors, tokenizer: PreTrainedTokenizerBase | None, generator: Generator) -> Tensors:
        return batch | {"pixel_values": shift(batch["pixel_values"], generator)}


@cache
def _data(task: str, split: str) -> Tensors:
    """A split of a task, the same at every call; every split has its own seed."""
    pixels, labels = TASKS[task][0](split, Generator().manual_seed(list(COUNTS).index(split)))
    return {"pixel_values": fashion_mnist.normalise(pixels), "labels": labels}
