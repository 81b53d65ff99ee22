"""Calibration data as micro-batches of one shape, which advance through the model together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one shape.

    Attributes:
        inputs: the model's keyword arguments, samples first.
        task: the expert that the samples belong to; None: unknown.
        real: how many samples there are; the rest fills the batch up and counts nothing.
        number: its place among all batches of all processes.
    """

    inputs: Mapping[str, Tensor]
    task: int | None
    real: int
    number: int = 0

    @property
    def size(self) -> int:
        """Samples, with those that fill up."""
        return len(next(iter(self.inputs.values())))


def micro_batches(
    batches: Iterable[tuple[int | None, Mapping[str, Tensor]]], size: int, pad_ids: Mapping[str, int]
) -> list[MicroBatch]:
    """Batches of one number of samples and one length: short ones are filled up, and the fill is marked.

    Args:
        batches: (task, inputs) with at most `size` samples each.
        size: samples per micro-batch; as many as the largest batch has, if that is smaller.
        pad_ids: what fills up sequences, by input name; 0 where nothing is said.
    """
    found = [(task, dict(inputs)) for task, inputs in batches]
    lengths = [inputs["input_ids"].shape[1] for _, inputs in found if "input_ids" in inputs]
    longest = max(lengths, default=0)
    size = min(size, max(len(next(iter(inputs.values()))) for _, inputs in found))
    out = []
    for task, inputs in found:
        real = len(next(iter(inputs.values())))
        sequence = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        filled = {}
        if sequence and sequence < longest and "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name, tensor in inputs.items():
            if sequence and tensor.dim() > 1 and tensor.shape[1] == sequence:
                tensor = functional.pad(tensor, (0, longest - sequence), value=pad_ids.get(name, 0))
            if real < size:
                tensor = torch.cat([tensor, tensor[:1].expand(size - real, *tensor.shape[1:])])
            filled[name] = tensor
        out.append(MicroBatch(filled, task, real, len(out)))
    if len({frozenset(batch.inputs) for batch in out}) > 1:  # some batches needed a mask, so all get one
        out = [
            batch
            if "attention_mask" in batch.inputs
            else replace(batch, inputs={**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["input_ids"])})
            for batch in out
        ]
    return out
