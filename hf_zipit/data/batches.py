"""The calibration data as the corrections want it, and models that run on it.

Some corrections need every sample at the same module before anything moves on: what a module is given depends on how
the modules before it were corrected. They take `together`: all samples as one batch, which bounds how many there may
be.
Under several processes each takes its share of the samples, and sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_zipit.data.processes import all_reduce_sum, placed
from hf_zipit.data.sources import CalibrationBatch, calibration_batches
from hf_zipit.errors import DataError

Inputs = dict[str, Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True)
class Batches:
    """Calibration batches, and this process's place among others.

    Attributes:
        batches: all batches, the same in every process.
        pad: the token that fills up shorter sequences.
        process, processes: this process's number and how many there are.
        all_reduce: the sum of a tensor over the processes.
        device: where models run.
        moments: the experts' moments, if the merge gathered them.
    """

    batches: Sequence[CalibrationBatch]
    pad: int = 0
    process: int = 0
    processes: int = 1
    all_reduce: Callable[[Tensor], Tensor] = unchanged
    device: torch.device = torch.device("cpu")
    moments: Any = None

    @classmethod
    def of(
        cls,
        calibration: Any,
        experts: Mapping[str, PreTrainedModel],
        *,
        processor: Any = None,
        batch_size: int = 32,
        accelerator: Accelerator | None = None,
        moments: Any = None,
    ) -> Batches:
        """Batches of calibration data of any usual kind: see `hf_zipit.data.sources`.

        Raises:
            DataError: if the data cannot be used.
        """
        accelerator = accelerator or Accelerator()
        model = next(iter(experts.values()))
        batches = calibration_batches(calibration, model, list(experts), processor=processor, batch_size=batch_size)

        pad = getattr(model.config, "pad_token_id", None) or 0
        number, count = accelerator.process_index, accelerator.num_processes
        all_reduce = partial(all_reduce_sum, accelerator=accelerator)
        return cls(tuple(batches), pad, number, count, all_reduce, accelerator.device, moments)

    def together(self, task: str | None, samples: int) -> Inputs:
        """This process's share of a task's first `samples` samples as one batch; of every task's, if `task` is None.

        Raises:
            DataError: if there are fewer samples than processes.
        """
        wanted = dict.fromkeys(batch.task for batch in self.batches if task is None or batch.task in (None, task))
        parts = []
        for one in wanted:
            joined = self._joined([b.inputs for b in self._first(one, samples)])
            parts.append({name: tensor[:samples] for name, tensor in joined.items()})
        joined = self._joined(parts)
        share = {name: tensor[self.process :: self.processes] for name, tensor in joined.items()}
        if size_of(joined) < self.processes:
            raise DataError(
                f"{size_of(joined)} calibration samples cannot be shared out among {self.processes} processes; give "
                "more."
            )
        return share

    def _first(self, task: str | None, samples: int) -> Iterator[CalibrationBatch]:
        seen = 0
        for batch in self.batches:
            if batch.task == task and seen < samples:
                seen += batch.samples
                yield batch

    def mixed(self) -> Iterator[Inputs]:
        """This process's batches with samples of all tasks in each, as far as every task has so many.

        A last one of a single sample joins the one before it: a BatchNorm in training cannot take it alone.
        """
        tasks = dict.fromkeys(batch.task for batch in self.batches)
        streams = [[batch for batch in self.batches if batch.task == task] for task in tasks]
        rounds = [[batch.inputs for batch in found if batch is not None] for found in zip_longest(*streams)]
        if len(rounds) > 1 and sum(map(size_of, rounds[-1])) == 1:
            rounds[-2:] = [rounds[-2] + rounds[-1]]
        return (self._joined(found) for found in rounds[self.process :: self.processes])

    def _joined(self, parts: Sequence[Mapping[str, Tensor]]) -> Inputs:
        """Batches one after the other; sequences are padded to the longest, and get a mask where that was needed."""
        lengths = [part["input_ids"].shape[1] if "input_ids" in part else 0 for part in parts]
        masked = len(set(lengths)) > 1 or len({"attention_mask" in part for part in parts}) > 1
        filled = []
        for part, length in zip(parts, lengths, strict=True):
            part = dict(part)
            if masked:
                part.setdefault("attention_mask", torch.ones_like(part["input_ids"]))
            for name, tensor in part.items():
                if length and tensor.dim() > 1 and tensor.shape[1] == length:
                    value = self.pad if name == "input_ids" else 0
                    part[name] = functional.pad(tensor, (0, max(lengths) - length), value=value)
            filled.append(part)
        return {name: torch.cat([part[name] for part in filled]) for name in filled[0]}


def size_of(inputs: Mapping[str, Tensor]) -> int:
    """The number of samples."""
    return len(next(iter(inputs.values())))


def pieces(inputs: Mapping[str, Tensor], size: int) -> Iterator[Inputs]:
    """The inputs, at most `size` samples at a time."""
    for start in range(0, size_of(inputs), size):
        yield {name: tensor[start : start + size] for name, tensor in inputs.items()}


@contextmanager
def running(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Models in eval mode on a device, without gradients; as they were on leaving."""
    with placed(models, device), torch.no_grad():
        yield
