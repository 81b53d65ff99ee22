"""The handwritten digits that scikit-learn carries (Alpaydin and Kaynak, 1998): 1,797 images of 8 x 8, enlarged."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLASSES = tuple("0123456789")


@cache
def images() -> tuple[Tensor, Tensor]:
    """The images `[1797, 28, 28]`, uint8, three pixels for one and a margin of two, and the classes, int64."""
    data = load_digits()
    pixels = torch.from_numpy(data.images).float().unsqueeze(1) * (255 / 16)
    large = interpolate(pixels, scale_factor=3, mode="bilinear")
    return pad(large, [2] * 4).squeeze(1).round().to(torch.uint8), torch.from_numpy(data.target).long()
