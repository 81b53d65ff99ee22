"""Scenes: several of Fashion-MNIST's garments on one noisy grey ground, later ones in front of earlier ones."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

SIDE, THING = 56, 28  # pixels
GROUND = 30  # pixels of a garment up to this value show what is behind it
NOISE = 20.0  # standard deviation of every pixel


def composed(things: Tensor, places: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of garments at given places.

    Args:
        things: images `[n, k, THING, THING]`, uint8, the hindmost first.
        places: the row and column of every image's corner, `[n, k, 2]`, 0 to `SIDE - THING`.

    Returns:
        the scenes `[n, SIDE, SIDE]`, uint8; which garment every pixel shows, -1 for the ground, of the same shape; and
        the garments' boxes `[n, k, 4]` as middle, width and height in shares of the scene, x before y.
    """
    count, several = things.shape[:2]
    scenes = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    owners = torch.full((count, SIDE, SIDE), -1)
    boxes = torch.zeros(count, several, 4)
    scene, steps = torch.arange(count)[:, None, None], torch.arange(THING)
    for k in range(several):
        down, across = places[:, k, :1] + steps, places[:, k, 1:] + steps
        window = scene, down[:, :, None], across[:, None, :]
        solid = things[:, k] > GROUND
        scenes[window] = torch.where(solid, things[:, k], scenes[window])
        owners[window] = torch.where(solid, k, owners[window])
        (top, bottom), (left, right) = _ends(solid.any(2)), _ends(solid.any(1))
        edges = (left + right, top + bottom, 2 * (right - left), 2 * (bottom - top))
        boxes[:, k] = torch.stack(edges, 1) / (2 * SIDE)
        boxes[:, k, :2] += places[:, k].flip(1) / SIDE
    noisy = scenes + NOISE * torch.randn(scenes.shape, generator=generator).abs()
    return noisy.clamp(max=255).to(torch.uint8), owners, boxes


def _ends(filled: Tensor) -> tuple[Tensor, Tensor]:
    """The first filled place of every row `[n, places]`, and the one behind the last."""
    places = filled.shape[1]
    first = filled.int().argmax(1)
    return first, places - filled.flip(1).int().argmax(1)
