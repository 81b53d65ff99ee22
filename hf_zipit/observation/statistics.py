"""What layers see and how much weights matter: per expert, on its own task's data, summed so that the sums add.

- `grams`: of every layer's inputs x the sum of x x^T, `[in, in]` (a convolution's inputs are the patches under its
  kernel); of every norm's normalised inputs the sums of their squares, `[units]`.
- `fisher`: of every parameter the sum over samples of its squared gradient, of its shape.

Both are sums, so that those of several batches, processes, files and owners of data add up to the sums of all of it.
Who has data but may not share it can share these, and what is merged with them is what would have been merged with the
data (arXiv 2212.09849). They are in the experts' own units: every alignment can use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_zipit.errors import DataError
from hf_zipit.observation.file import reading, write
from hf_zipit.observation.moments import NARROW

KINDS = ("grams", "fisher")

_FORMAT = "hf_zipit.statistics/1"


@dataclass(eq=False)
class Summed:
    """A number of rows or samples, and what was summed over them (float64)."""

    count: float
    total: Tensor

    def __add__(self, other: Summed) -> Summed:
        return Summed(self.count + other.count, self.total + other.total)

    def mean(self) -> Tensor:
        return self.total / max(self.count, 1e-300)


def product_sum(x: Tensor, y: Tensor) -> Tensor:
    """x^T y of rows `[rows, n]` and `[rows, m]`, float64: narrow ones are multiplied in it, wide ones in float32."""
    if x.device.type == "cpu" and max(x.shape[1], y.shape[1]) <= NARROW:
        return x.double().T @ y.double()
    parts = zip(x.float().split(4096), y.float().split(4096), strict=True)
    return sum((a.T @ b).to("cpu", torch.float64) for a, b in parts)  # type: ignore[return-value]


@dataclass(eq=False)
class LayerStatistics:
    """The statistics of some experts.

    Attributes:
        sums: by kind, task and name of the weight.
        same: weights whose layer reads what another one's reads, by name that other one, which has the sums.
        fingerprint: by task of whose weights (`experts`, sha256) and of which batches (`data`, a list of sha256) they
            are, and the number of `samples`; and the library's `version`.
    """

    sums: dict[str, dict[str, dict[str, Summed]]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose they are."""
        return tuple(dict.fromkeys(task for found in self.sums.values() for task in found))

    def mean(self, kind: str, task: str, name: str) -> Tensor | None:
        """The mean over rows or samples for one weight; None where its layer was not observed."""
        found = self.sums.get(kind, {}).get(task, {}).get(self.same.get(name, name) if kind == "grams" else name)
        return None if found is None else found.mean()

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics of both: those of different tasks side by side, those of one task added up.

        Raises:
            DataError: they are of different experts by one name, or hold the same data of one task.
        """
        mine, its = (found.fingerprint for found in (self, other))
        for task in set(self.tasks) & set(other.tasks):
            if mine["experts"][task] != its["experts"][task]:
                raise DataError(f"The statistics of {task!r} that are to be added are of different weights.")
            if set(mine["data"][task]) & set(its["data"][task]):
                raise DataError(f"The statistics of {task!r} that are to be added hold some of the same data twice.")
        sums = {kind: {task: dict(own) for task, own in found.items()} for kind, found in self.sums.items()}
        for kind, found in other.sums.items():
            for task, own in found.items():
                into = sums.setdefault(kind, {}).setdefault(task, {})
                for name, values in own.items():
                    into[name] = into[name] + values if name in into else values
        fingerprint = {
            "experts": {**mine.get("experts", {}), **its.get("experts", {})},
            "data": _added(mine.get("data", {}), its.get("data", {})),
            "samples": _added(mine.get("samples", {}), its.get("samples", {})),
            "version": its.get("version"),
        }
        return LayerStatistics(sums, {**self.same, **other.same}, fingerprint)

    def of(self, experts: Mapping[str, str]) -> LayerStatistics:
        """These, checked to be of the experts with these fingerprints, by task.

        Raises:
            DataError: a task has none, or they are of other weights.
        """
        for task, print_ in experts.items():
            if task not in self.tasks:
                raise DataError(f"There are no statistics of the expert {task!r}, only of {list(self.tasks)}.")
            if self.fingerprint["experts"][task] != print_:
                raise DataError(
                    f"The statistics of {task!r} are of other weights than the expert's (a method that folds norms "
                    "changes them, too): gather them again."
                )
        return self

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; it replaces an older one only when it is complete.

        Raises:
            OutputError: if the file cannot be written.
        """
        entries, tensors = [], {}
        for kind, found in self.sums.items():
            for task, own in found.items():
                for name, values in own.items():
                    tensors[str(len(entries))] = values.total.cpu().contiguous()
                    entries.append({"kind": kind, "task": task, "name": name, "count": values.count})
        header = {"format": _FORMAT, "fingerprint": self.fingerprint, "same": self.same, "sums": entries}
        return write(path, "statistics", header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> LayerStatistics:
        """Read a file of `save`.

        Raises:
            DataError: if there is no such file, it is not a whole one, or it was changed since it was written.
        """
        with reading(path, "statistics", _FORMAT) as (header, tensors):
            found = cls({}, dict(header["same"]), dict(header["fingerprint"]))
            for i, entry in enumerate(header["sums"]):
                total, count = tensors[str(i)], float(entry["count"])
                if entry["kind"] not in KINDS or total.dtype != torch.float64 or not total.isfinite().all():
                    raise DataError(f"{path} is not a whole statistics file: {entry['name']} holds no such sums.")
                found.sums.setdefault(entry["kind"], {}).setdefault(entry["task"], {})[entry["name"]] = Summed(
                    count, total
                )
            for part in ("experts", "data", "samples"):
                if set(found.fingerprint[part]) != set(found.tasks):
                    raise DataError(f"{path} does not say of which {part} its sums are; gather them again.")
        return found


Known = LayerStatistics | str | Path | Sequence[LayerStatistics | str | Path]
"""Statistics, their file, or several of either, to be added up."""


def loaded(known: Known) -> LayerStatistics:
    """All of the given statistics together."""
    parts: Iterable[Any] = (known,) if isinstance(known, (LayerStatistics, str, Path)) else known
    found = LayerStatistics()
    for part in parts:
        found = found.merge(part if isinstance(part, LayerStatistics) else LayerStatistics.load(part))
    return found


def _added(mine: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers added up and lists joined, key by key."""
    return {**mine, **its, **{key: mine[key] + its[key] for key in mine.keys() & its.keys()}}
