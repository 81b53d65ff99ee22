"""Drawn images of 28 x 28 grey pixels with seeded places, sizes and noise: letters, shapes, dots and stripes.

Generated with Pillow's own font, so that nothing has to be installed. Every function returns images `[n, 28, 28]`,
uint8, and the classes `[n]`, int64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

SIDE = 28
NOISE = 30.0  # standard deviation of every pixel
LETTERS = tuple("ABEFGHKMRS")
SHAPES = ("disc", "ring", "square", "frame", "plus", "cross")
DOTS = ("one", "two", "three", "four", "five")
ANGLES = ("0", "30", "60", "90", "120", "150")


def letters(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Capital letters of 12 to 22 pixels."""
    fonts = [ImageFont.load_default(size) for size in range(12, 23)]

    def draw(pen: ImageDraw.ImageDraw, label: int, chance: list[float]) -> None:
        middle = (SIDE / 2 + 8 * (chance[0] - 0.5), SIDE / 2 + 8 * (chance[1] - 0.5))
        font = fonts[int(chance[2] * len(fonts))]
        pen.text(middle, LETTERS[label], fill=_bright(chance[3]), font=font, anchor="mm")

    return _drawn(draw, len(LETTERS), count, generator)


def shapes(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Filled and hollow figures of 5 to 10 pixels' radius."""

    def draw(pen: ImageDraw.ImageDraw, label: int, chance: list[float]) -> None:
        radius = 5 + 5 * chance[2]
        x, y = (radius + 1 + (SIDE - 2 * radius - 3) * place for place in chance[:2])
        box, bright = (x - radius, y - radius, x + radius, y + radius), _bright(chance[3])
        if label < 2:
            pen.ellipse(box, fill=bright if label == 0 else None, outline=bright, width=2)
        elif label < 4:
            pen.rectangle(box, fill=bright if label == 2 else None, outline=bright, width=2)
        else:
            ends = ((-1, 0), (0, 1)) if label == 4 else ((-1, -1), (-1, 1))
            for right, down in ends:
                start, end = (x + right * radius, y + down * radius), (x - right * radius, y - down * radius)
                pen.line((start, end), fill=bright, width=2)

    return _drawn(draw, len(SHAPES), count, generator)


def dots(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """One to five dots in nine places."""

    def draw(pen: ImageDraw.ImageDraw, label: int, chance: list[float]) -> None:
        for place in np.argsort(chance[4:])[: label + 1]:
            x, y = 5 + 9 * (place % 3) + 3 * (chance[0] - 0.5), 5 + 9 * (place // 3) + 3 * (chance[1] - 0.5)
            radius = 1.5 + 1.5 * chance[2]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_bright(chance[3]))

    return _drawn(draw, len(DOTS), count, generator)


def stripes(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Waves of 4 to 10 pixels' length in six directions."""
    labels = torch.randint(len(ANGLES), (count,), generator=generator)
    angle = labels * torch.pi / len(ANGLES)
    length, phase = torch.rand(2, count, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    turns = along / (4 + 6 * length)[:, None, None] + phase[:, None, None]
    return _noisy(127 + 80 * (2 * torch.pi * turns).sin(), generator), labels


def _drawn(
    draw: Callable[[ImageDraw.ImageDraw, int, list[float]], None], classes: int, count: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Images that `draw` puts on a black ground, given a pen, the label and 13 numbers of 0 to 1."""
    labels = torch.randint(classes, (count,), generator=generator)
    chances = torch.rand(count, 13, generator=generator)
    images = []
    for label, chance in zip(labels.tolist(), chances.tolist(), strict=True):
        image = Image.new("L", (SIDE, SIDE))
        draw(ImageDraw.Draw(image), label, chance)
        images.append(np.asarray(image))
    return _noisy(torch.from_numpy(np.stack(images)), generator), labels


def _bright(chance: float) -> int:
    return round(150 + 105 * chance)


def _noisy(pixels: Tensor, generator: Generator) -> Tensor:
    noise = NOISE * torch.randn(pixels.shape, generator=generator)
    return (pixels + noise).clamp(0, 255).to(torch.uint8)
