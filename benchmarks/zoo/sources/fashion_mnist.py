"""Fashion-MNIST (arXiv 1708.07747): 60,000 training and 10,000 test images of clothes, 28 x 28 in one channel.

Read from Debian's `dataset-fashion-mnist` where it is installed, else through `datasets` from the Hub.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
HUB = "zalando-datasets/fashion_mnist"
MEAN, STD = 0.2860, 0.3530
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """The images `[n, 28, 28]`, uint8, and the classes `[n]`, int64, of `"train"` or `"test"`."""
    prefix = {"train": "train", "test": "t10k"}[split]
    if (FOLDER / f"{prefix}-images-idx3-ubyte.gz").exists():
        pixels = _idx(FOLDER / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _idx(FOLDER / f"{prefix}-labels-idx1-ubyte.gz", header=8)
    else:
        pixels, labels = _from_hub(split)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))


def normalise(pixels: Tensor) -> Tensor:
    """Images `[n, 28, 28]` with values 0 to 255 as the experts' `pixel_values` `[n, 1, 28, 28]`."""
    return ((pixels.float() / 255 - MEAN) / STD).unsqueeze(1)


def _idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def _from_hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    from datasets import load_dataset  # slow to import, and not needed where the package is installed

    data = load_dataset(HUB, split=split).with_format("numpy")
    return np.stack(data["image"][:]), np.asarray(data["label"][:])
