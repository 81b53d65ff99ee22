"""Hidden tokens for masked language models: drawn once for a split, and again for every training batch."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from benchmarks.zoo.pair import IGNORED, Tensors


def hide(text: Tensor, candidates: Tensor, share: float, mask: int, generator: Generator) -> Tensors:
    """Replace a random share of every text's candidates by the mask, at least one.

    Args:
        text: token ids, `[texts, length]`.
        candidates: which tokens may be hidden, `[texts, length]`, bool.
        share: the probability of a candidate to be hidden.
        mask: the id of the mask.

    Returns:
        `input_ids` with the mask, and `labels` with the hidden tokens and -100 elsewhere.
    """
    draw = torch.rand(text.shape, generator=generator).masked_fill(~candidates, 2.0)
    hidden = (draw < share) | ((draw == draw.min(1, keepdim=True).values) & (draw < 2.0))
    return {"input_ids": text.masked_fill(hidden, mask), "labels": text.masked_fill(~hidden, IGNORED)}


def shown(batch: Tensors) -> Tensor:
    """The whole texts of masked samples, `[texts, length]`."""
    return torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
