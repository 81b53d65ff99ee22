"""Which token masked language models fill in, where neither the configuration nor a processor names it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.data.calibration import MicroBatch

OFTEN = 0.05
"""A mask is at least this share of the tokens,"""

ANSWERED = 0.01
"""is given as an answer at most this often, as a share of how often it is seen,"""

UNEVEN = 0.1
"""and its place explains no more than this share of its variance: columns have their blanks."""


@torch.no_grad()
def asked_token(experts: Sequence[PreTrainedModel], batches: Sequence[MicroBatch]) -> int | None:
    """The token that is often in the inputs, at no place more than at others, and that no expert ever answers with.

    One batch of every task is looked at. None if there is no such token, as in texts without masks.
    """
    first = {batch.task: batch for batch in reversed(batches) if "input_ids" in batch.inputs}
    found: dict[int, float] | None = None
    for task, batch in first.items():
        shares = _masks([experts[task]] if task is not None else experts, batch)
        found = shares if found is None else {token: found[token] for token in found.keys() & shares.keys()}
    return max(found, key=found.__getitem__) if found else None


def _masks(experts: Sequence[PreTrainedModel], batch: MicroBatch) -> dict[int, float]:
    """The tokens that may be masks in a batch, and how often each is seen."""
    ids = batch.inputs["input_ids"][: batch.real]
    mask = batch.inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[: batch.real] > 0
    answers = []
    for expert in experts:
        logits = expert(**{name: x[: batch.real].to(expert.device) for name, x in batch.inputs.items()}).logits
        answers.append(logits.argmax(-1).to(ids.device)[real])
    answered = torch.cat(answers).bincount(minlength=int(ids.max()) + 1)
    found = {}
    for token in ids[real].unique().tolist():
        seen = (ids == token) & real
        share = float(seen.sum() / real.sum())
        if share < OFTEN or answered[token] > ANSWERED * seen.sum() * len(experts):
            continue
        per_sample = seen.sum(1)
        if per_sample.min() < per_sample.max() and _unevenness(seen, real) < UNEVEN:  # a separator: always as many
            found[token] = share
    return found


def _unevenness(seen: Tensor, real: Tensor) -> float:
    """How much of the variance of `[samples, positions]` is between positions, beyond what chance makes of it."""
    counts = real.sum(0)
    used = counts > 0
    rates = seen.sum(0)[used] / counts[used]
    mean = seen.sum() / counts.sum()
    between = (counts[used] * (rates - mean).square()).sum() / counts.sum()
    chance = mean * (1 - mean) * used.sum() / counts.sum()
    return float((between - chance) / (mean * (1 - mean)).clamp_min(1e-12))
