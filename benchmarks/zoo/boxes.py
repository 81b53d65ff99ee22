"""How detectors are scored: an object is found by a box of its class that overlaps it by at least half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.zoo.pair import IGNORED, Metric

OVERLAP = 0.5


@dataclass(frozen=True)
class Detection(Metric):
    """The share of found objects, of all objects and false boxes together.

    A split's labels are objects `[n, objects, 5]`: the class, and the box as middle, width and height; -100 where
    there is none. The model gives `logits` `[n, boxes, classes + 1]`, whose last entry says that there is nothing, and
    `pred_boxes` `[n, boxes, 4]`. No box finds two objects, and no object is found twice.
    """

    def tally(self, output: Mapping[str, Any], labels: Tensor) -> tuple[int, int]:
        logits, boxes = output[self.output], output["pred_boxes"]
        said = logits.argmax(-1)
        given = said != logits.shape[-1] - 1
        hit = count = 0
        for i in range(len(labels)):
            objects = labels[i][labels[i, :, 0] != IGNORED]
            fits = (overlap(objects[:, 1:], boxes[i, given[i]]) >= OVERLAP) & (objects[:, :1] == said[i, given[i]])
            found = int(fits[linear_sum_assignment(~fits)].sum())
            hit += found
            count += len(objects) + int(given[i].sum()) - found
        return hit, count

    def targets(self, labels: Tensor) -> Tensor:
        return super().targets(labels[..., 0]).long()


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes `[n, 4]` and `[m, 4]`, given by middle, width and height, as `[n, m]`."""
    (low, high), (other_low, other_high) = (
        (boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2) for boxes in (first, second)
    )
    sides = (torch.minimum(high[:, None], other_high) - torch.maximum(low[:, None], other_low)).clamp(min=0)
    common = sides.prod(-1)
    areas = first[:, 2:].prod(-1)[:, None] + second[:, 2:].prod(-1)
    return common / (areas - common)
