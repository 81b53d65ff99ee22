"""The samples of a polish: a seeded part is held out, the rest is gone through in a seeded order.

Invariants: which samples a step gets depends on the seed and the step alone, so that training can go on anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from hf_zipit.data.calibration import Calibration, Inputs, pieces, size_of, without_labels
from hf_zipit.errors import DataError
from hf_zipit.experts.fingerprint import digest_tensors

SEED_STRIDE = 1_000_003
"""Between the seeds of passes over the data: a prime, so that seeds that lie side by side share no pass."""


class Samples:
    """Every task's samples, divided into those that are learnt from and those that are held out.

    Where nobody knows which task a sample belongs to, all samples are every task's.
    """

    def __init__(self, calibration: Calibration, tasks: tuple[str, ...], held_out: float, seed: int) -> None:
        """`held_out` is a share; at least one sample of every task is. Raises DataError for fewer than two."""
        self.tasks, self.seed = tasks, seed
        self._learnt: dict[str, Inputs] = {}
        self._held_out: dict[str, Inputs] = {}
        for number, task in enumerate(tasks):
            inputs = without_labels(calibration.whole(task))
            count = size_of(inputs)
            if count < 2:
                raise DataError(
                    f"Training holds samples out and needs at least two of every task, but the calibration data has "
                    f"{count} for the task {task!r}; give more"
                )
            order = self._order(count, number, 0)
            apart = min(max(1, round(held_out * count)), count - 1)
            self._held_out[task] = {name: tensor[order[:apart]] for name, tensor in inputs.items()}
            self._learnt[task] = {name: tensor[order[apart:]] for name, tensor in inputs.items()}
        self._pass = cache(self._order)

    def _order(self, count: int, task: int, number: int) -> Tensor:
        """The order of a task's samples in one pass over them."""
        seed = self.seed + SEED_STRIDE * (1 + number * len(self.tasks) + task)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    @property
    def counts(self) -> dict[str, list[int]]:
        """By task how many samples are learnt from, and how many are held out."""
        return {task: [size_of(self._learnt[task]), size_of(self._held_out[task])] for task in self.tasks}

    def digest(self) -> str:
        """The sha256 of all samples."""
        parts = {"learnt": self._learnt, "held out": self._held_out}
        named = ((f"{part}/{t}/{n}", x) for part, by in parts.items() for t, own in by.items() for n, x in own.items())
        return digest_tensors(named)

    def batch(self, task: str, step: int, size: int) -> Inputs:
        """The samples of a task that a step learns from."""
        inputs = self._learnt[task]
        count, number = size_of(inputs), self.tasks.index(task)
        size = min(size, count)
        places = range(step * size, (step + 1) * size)
        rows = torch.stack([self._pass(count, number, 1 + place // count)[place % count] for place in places])
        return trim({name: tensor[rows] for name, tensor in inputs.items()})

    def held_out(self, task: str, size: int) -> Iterator[Inputs]:
        """The held-out samples of a task, `size` at a time."""
        return map(trim, pieces(self._held_out[task], size))


def trim(inputs: Mapping[str, Tensor]) -> Inputs:
    """Without the last positions of texts that are padding in every sample."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return dict(inputs)
    width, used = mask.shape[1], mask.any(0).nonzero().flatten()
    end = int(used[-1]) + 1 if len(used) else width
    return {name: x[:, :end] if x.dim() == 2 and x.shape[1] == width else x for name, x in inputs.items()}
