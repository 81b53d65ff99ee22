"""Calibration data: read once, and given to every stage as batches of the models' inputs as often as it asks.

    calibration = Calibration({"clothes": dataset, "shoes": loader}, processor=processor, batch_size=32)

Whatever the kind of the data (see `sources.py`), a one-pass iterable included, it is read once, for the experts of a
merge. Its batches are prepared when a stage first needs them (a process that skips a batch pays nothing for it) and
kept, in memory or beyond a budget in temporary files. Stages that need other sizes regroup what is kept. Where a
device is full, a stage starts again with half as many samples at once, and all later ones have no more
(`while_it_fits`).

This is also the one place that knows where and how a merge runs: the device, this process's share of the batches and
how tensors are summed over the processes.

Invariants: the order is the same in every pass and every process; the tasks take turns, so that any first part of the
batches covers all of them; labels are kept aside, and no stage that makes a model reads them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from hf_zipit.data.inputs import ModelInputs, prepare, renumbered, tensor_of
from hf_zipit.data.kept import Keeper
from hf_zipit.data.labels import IGNORED
from hf_zipit.data.processes import all_reduce_sum
from hf_zipit.data.sources import Columns, by_task, raw_batches, rows_of
from hf_zipit.errors import DataError, is_out_of_memory
from hf_zipit.experts.fingerprint import digest_strings, digest_tensors
from hf_zipit.hub.processors import OwnProcessor

logger = logging.getLogger(__name__)

Inputs = dict[str, Tensor]

Result = TypeVar("Result")

LABELS = "labels"

LARGEST = 1e12
"""Larger inputs overflow float32 where a model squares them."""


class CalibrationBatch:
    """Some samples of one task.

    Attributes:
        task: the task that the samples belong to; None for one collection for all tasks.
    """

    def __init__(self, task: str | None, load: Callable[[], Inputs], keeper: Keeper) -> None:
        self.task = task
        self._load, self._keeper = load, keeper
        self._kept: Callable[[], Inputs] | None = None

    def columns(self) -> Inputs:
        """The inputs, and `labels` where the data has some: tensors `[samples, ...]`, prepared when first read."""
        if self._kept is None:
            self._kept = self._keeper.keep(self._load())
            del self._load  # and with it the raw data of a one-pass source
        return self._kept()

    @property
    def inputs(self) -> Inputs:
        """The model's keyword arguments: tensors `[samples, ...]`."""
        return without_labels(self.columns())

    @cached_property
    def samples(self) -> int:
        return size_of(self.columns())

    def split(self, size: int) -> list[CalibrationBatch]:
        """Its samples, at most so many in each."""
        return [
            CalibrationBatch(self.task, partial(dict, piece), self._keeper) for piece in pieces(self.columns(), size)
        ]


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one shape.

    Attributes:
        inputs: the model's keyword arguments, samples first.
        task: the position of the expert that the samples belong to; None: unknown.
        real: how many samples there are; the rest fills the batch up and counts nothing.
        number: its place among all batches of all processes.
        first: the number of its first sample among those of its task, whatever the size of batches.
    """

    inputs: Mapping[str, Tensor]
    task: int | None
    real: int
    number: int = 0
    first: int = 0

    @property
    def size(self) -> int:
        """Samples, with those that fill up."""
        return size_of(self.inputs)


@dataclass(eq=False)
class Calibration:
    """Calibration data, and how it is run.

    Args:
        data: a little unlabelled data, by task or one collection for all tasks: a `datasets.Dataset` or
            `IterableDataset`, a `DataLoader`, tensors, samples, or any iterable of batches.
        processor: image processor, tokenizer or processor, for raw images and texts; where none is given, of every
            task's data its expert's own, and the first expert's for one collection for all tasks.
        columns: names in the data -> names of the model's inputs, `image` or `text`.
        batch_size: samples per forward pass. Larger batches of a `DataLoader` or iterable are split, smaller ones
            left.
        accelerator: where to run; one with default settings is made when it is needed.
        memory_gb: what prepared batches and, together with them, the activations that a refit keeps between layers may
            take of the CPU's memory; what is beyond goes to temporary files.

    Raises:
        DataError: the batch size is below 1, or the memory not above 0.
    """

    data: Any
    processor: Any = None
    columns: Mapping[str, str] | None = None
    batch_size: int = 32
    accelerator: Accelerator | None = None
    memory_gb: float = 4.0
    tasks: tuple[str, ...] = field(default=(), init=False)
    inputs: ModelInputs | None = field(default=None, init=False)
    _streams: dict[str | None, list[CalibrationBatch]] = field(default_factory=dict, init=False, repr=False)
    _most: int | None = field(default=None, init=False, repr=False)  # samples at once, where a device was full
    _given: int = field(
        default=0, init=False, repr=False
    )  # at most so many are in the batches that were asked for last

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"The batch size must be at least 1, not {self.batch_size}.")
        if not self.memory_gb > 0:
            raise DataError(f"memory_gb must be above 0, not {self.memory_gb}.")
        self._keeper = Keeper(self.memory_gb)

    @classmethod
    def of(cls, data: Any, **settings: Any) -> Calibration | None:
        """The data as calibration data; None where there is none. Settings of None are not set.

        Raises DataError if settings are given beside a `Calibration`, which has its own.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        if not isinstance(data, cls):
            return None if data is None else cls(data, **settings)
        if settings:
            accelerator = settings.pop("accelerator", data.accelerator)
            if settings:
                raise DataError(f"{', '.join(settings)} is the Calibration's own; set it where that is made.")
            data.accelerator = data.accelerator or accelerator
        return data

    def read(self, experts: Mapping[str, nn.Module]) -> Calibration:
        """Itself, with the raw data read for these experts; nothing happens where it was read for them before.

        Raises DataError if there is no data (of a task), a task is unknown or missing, or it was read for others.
        """
        tasks, inputs = tuple(experts), ModelInputs.of(next(iter(experts.values())))
        if self._streams and (self.tasks, self.inputs) != (tasks, inputs):
            raise DataError(
                f"This calibration data was read for the tasks {list(self.tasks)} of {self.inputs.architecture}, and "
                f"now is asked for {list(tasks)} of {inputs.architecture}; make a Calibration for each."
            )
        if not self._streams:
            streams, columns = {}, self.columns or {}
            first = next(iter(experts))
            if renumbered(experts[first]) and not isinstance(self.data, Mapping):
                raise DataError(
                    "Experts with tokenizers of their own read one collection in different ways; give the calibration "
                    f"data by task: {{{', '.join(f'{task!r}: ...' for task in tasks)}}}."
                )
            for task, part in by_task(for_tasks(self.data, tasks), inputs, tasks, columns).items():
                where = where_of(task)
                processor = self.processor or OwnProcessor(experts[task or first])
                streams[task] = [
                    CalibrationBatch(task, partial(load_batch, load, inputs, processor, where), self._keeper)
                    for load in raw_batches(part, inputs.main, self.batch_size, where, columns)
                ]
                if not streams[task]:
                    raise DataError(f"There is no calibration data{where}: it is empty.")
            self.tasks, self.inputs, self._streams = tasks, inputs, streams
        return self

    # ------------------------------------------------------------------------------------------- where it runs

    def run_on(self) -> Accelerator:
        """The accelerator, made at the first call where none was given."""
        self.accelerator = self.accelerator or Accelerator()
        return self.accelerator

    @property
    def device(self) -> torch.device:
        return self.run_on().device

    @property
    def process(self) -> int:
        """The number of this process."""
        return self.run_on().process_index

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return self.run_on().num_processes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, where the tensor is."""
        return all_reduce_sum(tensor, self.run_on())

    @property
    def memory_left(self) -> float:
        """Bytes of the CPU's memory that the budget leaves for what a stage keeps."""
        return self._keeper.left

    def while_it_fits(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns; where the device is full it starts again with half as many samples at once, and says
        so.

        `work` asks for its batches itself, and leaves nothing behind when it fails. Of several processes the others
        would wait: there the error is raised, as it is where single samples do not fit.
        """
        while True:
            self._given = 0
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.processes > 1:
                    raise
                given = min(self._given, max(batch.samples for batches in self._streams.values() for batch in batches))
                if given < 2:
                    raise
                logger.warning("%s is full with %d samples at once; going on with half of them.", self.device, given)
            self._most = given // 2
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()

    # --------------------------------------------------------------------------------------------- what is read

    @property
    def by_task(self) -> bool:
        """Whether every sample's task is known."""
        return None not in self._streams

    def batches(self) -> list[CalibrationBatch]:
        """All batches of all processes, the tasks taking turns."""
        return in_turns(self._as_they_fit())

    def _as_they_fit(self) -> list[list[CalibrationBatch]]:
        """The batches of every task; in parts where a device was full."""
        self._given = min(self.batch_size, self._most or self.batch_size)
        if self._most is None:
            return list(self._streams.values())
        return [[part for batch in batches for part in batch.split(self._most)] for batches in self._streams.values()]

    def micro_batches(self, size: int) -> list[MicroBatch]:
        """All samples of all processes as batches of one number of samples and one length.

        Short batches are filled up, and the fill is marked. There are `size` samples in each, or as many as the
        largest batch has, if that is fewer.
        """
        size = min(size, self._most or size)
        streams = [
            [(task, group) for group in self._grouped(batches, size)] for task, batches in self._streams.items()
        ]
        found = in_turns(streams)
        inputs = even_out([group for _, group in found], self.inputs.pad)
        sizes = [size_of(group) for group in inputs]
        self._given = max(sizes)
        out, seen = [], Counter[str | None]()
        for number, ((task, _), group, real) in enumerate(zip(found, inputs, sizes, strict=True)):
            fill = max(sizes) - real
            filled = {
                name: torch.cat([tensor, tensor[:1].expand(fill, *tensor.shape[1:])]) if fill else tensor
                for name, tensor in group.items()
            }
            place = None if task is None else self.tasks.index(task)
            out.append(MicroBatch(filled, place, real, number, seen[task]))
            seen[task] += real
        return out

    def _grouped(self, batches: Sequence[CalibrationBatch], size: int) -> Iterator[Inputs]:
        """The samples of one task, `size` at a time."""
        waiting: list[Inputs] = []
        for batch in batches:
            waiting.append(batch.inputs)
            while (count := sum(map(size_of, waiting))) >= size:
                joined = join(waiting, self.inputs.pad)
                yield rows_of(joined, 0, size)
                waiting = [rows_of(joined, size, count)] if count > size else []
        if waiting:
            yield join(waiting, self.inputs.pad)

    def together(self, task: str | None, samples: int) -> Inputs:
        """This process's share of a task's first `samples` samples as one batch; of every task's, if `task` is None.

        Raises DataError if there are fewer samples than processes.
        """
        wanted = [one for one in self._streams if task is None or one in (None, task)]
        parts = []
        for one in wanted:
            part = join(list(self._first(self._streams[one], samples)), self.inputs.pad)
            parts.append(rows_of(part, 0, samples))
        joined = join(parts, self.inputs.pad)
        if size_of(joined) < self.processes:
            raise DataError(
                f"{size_of(joined)} calibration samples cannot be shared out among {self.processes} processes; give "
                "more."
            )
        return {name: tensor[self.process :: self.processes] for name, tensor in joined.items()}

    def _first(self, batches: Iterable[CalibrationBatch], samples: int) -> Iterator[Inputs]:
        seen = 0
        for batch in batches:
            if seen >= samples:
                return
            seen += batch.samples
            yield batch.inputs

    def mixed(self) -> Iterator[Inputs]:
        """This process's batches with samples of all tasks in each, as far as every task has that many.

        A last one of a single sample joins the one before it: a BatchNorm in training cannot take it alone.
        """
        rounds = [[batch for batch in found if batch is not None] for found in zip_longest(*self._as_they_fit())]
        if len(rounds) > 1 and sum(batch.samples for batch in rounds[-1]) == 1:
            rounds[-2:] = [rounds[-2] + rounds[-1]]
        for found in rounds[self.process :: self.processes]:
            yield join([batch.inputs for batch in found], self.inputs.pad)

    # -------------------------------------------------------------------------------------------- parts of it

    def whole(self, task: str | None) -> Inputs:
        """All samples of a task (of the one collection for all tasks, where there is one), with their `labels`.

        Labels that do not fit the inputs, such as those of words where the model reads tokens, are left out.
        """
        batches = self._streams[task if task in self._streams else None]
        even = even_out([batch.columns() for batch in batches], self.inputs.pad)
        fitting = len({part[LABELS].shape[1:] if LABELS in part else None for part in even}) == 1
        return join([part if fitting else without_labels(part) for part in even], self.inputs.pad)

    def select(self, rows: Mapping[str | None, Sequence[int]]) -> Calibration:
        """Calibration data of some samples, by task, in the order of their positions."""
        part = self._without_data()
        for task, positions in rows.items():
            index = torch.as_tensor(positions)
            chosen = {name: tensor[index] for name, tensor in self.whole(task).items()}
            part._streams[task] = [
                CalibrationBatch(task, partial(dict, piece), part._keeper) for piece in pieces(chosen, self.batch_size)
            ]
        return part

    def of_tasks(self, tasks: Sequence[str]) -> Calibration:
        """The data of some of the tasks; all of it where it is one collection for all."""
        part = self._without_data()
        part.tasks = tuple(tasks)
        part._streams = {task: batches for task, batches in self._streams.items() if task is None or task in tasks}
        return part

    def and_more(self, more: Mapping[str | None, Iterable[Callable[[], Inputs]]]) -> Calibration:
        """The same calibration data, and behind it further batches of some tasks: what makes them, when asked for."""
        whole = self._without_data()
        whole._streams = {
            task: [
                *batches,
                *(CalibrationBatch(task, make, whole._keeper) for make in more.get(task, ())),
            ]
            for task, batches in self._streams.items()
        }
        return whole

    def _without_data(self) -> Calibration:
        """The same for the same experts, and nothing read."""
        other = replace(self)
        other.tasks, other.inputs = self.tasks, self.inputs
        return other

    def fingerprint(self) -> dict[str, Any]:
        """The number of samples by task, or of all, and the sha256 of what models read of them; empty if none was.

        It depends on the batches' size, which pads them. Of several processes each reads its share, and all call this.
        """
        if not self._streams:
            return {}
        own = [
            (number, digest_tensors(sorted(batch.inputs.items()), str(batch.task)))
            for number, batch in enumerate(in_turns(self._streams.values()))
            if number % self.processes == self.process
        ]
        digests = sorted(gather_object(own)) if self.processes > 1 else own
        samples = {"all" if task is None else task: count for task, count in self.counts.items()}
        return {"samples": samples, "sha256": digest_strings(digest for _, digest in digests)}

    @property
    def counts(self) -> dict[str | None, int]:
        """The number of samples by task; under None of the one collection for all tasks."""
        return {task: sum(batch.samples for batch in batches) for task, batches in self._streams.items()}


def load_batch(load: Callable[[], Columns], inputs: ModelInputs, processor: Any, where: str) -> Inputs:
    """One raw batch, loaded and prepared, with its labels if it has one for each sample."""
    columns = load()
    found = prepare(columns, inputs, processor, where)
    check_values(found, where)
    labels = label_tensor(columns.get(LABELS))
    return found if labels is None or len(labels) != size_of(found) else {**found, LABELS: labels}


def check_values(inputs: Mapping[str, Tensor], where: str) -> None:
    """Raise DataError for numbers that no model can compute with: one would make all of the merged model NaN."""
    for name, tensor in inputs.items():
        if tensor.is_meta or tensor.is_complex():
            raise DataError(
                f"The calibration data{where} has values of type {tensor.dtype} on the device {tensor.device} in "
                f"{name!r}; give real numbers."
            )
        if tensor.is_floating_point() and not bool((tensor.abs() <= LARGEST).all()):
            wrong = ~(tensor.abs() <= LARGEST).reshape(len(tensor), -1)
            sample = int(wrong.any(1).nonzero()[0])
            value = float(tensor[sample].flatten()[wrong[sample]][0])
            raise DataError(
                f"A sample of the calibration data{where} (number {sample} of its batch) holds {value:g} in {name!r}; "
                "leave it out, or check how the data was prepared."
            )


def label_tensor(labels: Any) -> Tensor | None:
    """Labels as integers `[samples, ...]`; None where they are none."""
    if labels is None:
        return None
    try:
        return tensor_of(labels, IGNORED)[0].long()
    except (TypeError, ValueError, RuntimeError):  # texts, or of no one shape: nobody who merges reads them
        return None


def for_tasks(data: Any, tasks: Sequence[str]) -> Any:
    """Data by task; what was given for a merged model among the experts is for each of its tasks."""
    if not isinstance(data, Mapping):
        return data
    found = {}
    for name, part in data.items():
        parts = [task for task in tasks if task.startswith(f"{name}/")]
        found |= dict.fromkeys(parts, part) if parts and name not in tasks else {name: part}
    return found


def where_of(task: str | None) -> str:
    """The end of an error: whose data it is."""
    return "" if task is None else f" for the task {task!r}"


def size_of(inputs: Mapping[str, Tensor]) -> int:
    """The number of samples."""
    return len(next(iter(inputs.values())))


def without_labels(columns: Mapping[str, Tensor]) -> Inputs:
    """The model's keyword arguments among the columns."""
    return {name: tensor for name, tensor in columns.items() if name != LABELS}


def pieces(inputs: Mapping[str, Tensor], size: int) -> Iterator[Inputs]:
    """The inputs, at most `size` samples at a time."""
    for start in range(0, size_of(inputs), size):
        yield rows_of(inputs, start, start + size)


def in_turns(streams: Iterable[Sequence[Any]]) -> list[Any]:
    """The items of all streams, taken from each in turn."""
    missing = object()
    return [item for item in chain(*zip_longest(*streams, fillvalue=missing)) if item is not missing]


def join(parts: Sequence[Mapping[str, Tensor]], pad: int) -> Inputs:
    """Batches one after the other, sequences padded to the longest."""
    if len(parts) == 1:
        return dict(parts[0])
    even = even_out(parts, pad)
    return {name: torch.cat([part[name] for part in even]) for name in even[0]}


def even_out(parts: Sequence[Mapping[str, Tensor]], pad: int) -> list[Inputs]:
    """Batches whose sequences have one length: padded to the longest, with a mask in all where one needs it."""
    lengths = [part["input_ids"].shape[1] if "input_ids" in part else 0 for part in parts]
    masked = len(set(lengths)) > 1 or len({"attention_mask" in part for part in parts}) > 1
    values = {"input_ids": pad, LABELS: IGNORED}
    out = []
    for part, length in zip(parts, lengths, strict=True):
        own = dict(part)
        if masked:
            own.setdefault("attention_mask", torch.ones_like(own["input_ids"]))
        missing = max(lengths) - length
        for name, tensor in own.items():
            if missing and tensor.dim() > 1 and tensor.shape[1] == length:
                own[name] = functional.pad(tensor, (0, missing), value=values.get(name, 0))
        out.append(own)
    return out
