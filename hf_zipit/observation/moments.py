"""Moments: count, mean and second moment of the experts' concatenated features, per product of spaces.

The features of T experts on the *same* inputs are put side by side, `[rows, T*d]`, expert by expert. Their population
covariance and correlation are all that activation matching needs (ZipIt, arXiv 2305.03053, section 4), and they are
functions of three sums that add across batches, processes and files. So one streaming pass is enough.

Accuracy: blocks of a bounded number of rows are centred by the mean of the first block, multiplied in float32 and
summed in float64. Uncentred, a unit of mean 1000 and variance 1 would lose its variance to float32's 24 bits.

A product that can be observed in several places (the residual stream after every block) has sums of its own for every
probe. Its correlation is the *equal-weight average of the probes' correlations*: pooled, the layer with the largest
activations would drown the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_zipit.errors import DataError, ExpertError, OutputError, SpecError
from hf_zipit.experts.fingerprint import digest_strings, digest_tensors
from hf_zipit.files import replacing
from hf_zipit.hub.reasons import first_line
from hf_zipit.symmetry.spec import ProductKey

BLOCK_ROWS = 4096
"""Rows that are multiplied in float32 before they are added in float64."""

NARROW = 256
"""Up to this width T*d the blocks are multiplied in float64 on the CPU: it costs nothing there and is exact."""

FLOOR = 1e-14
"""Smallest standard deviation of a live unit: float32 does not hold the squares of what is much smaller. (ZipIt's code
divides by at least 1e-7, so that a unit of small variance is more similar to larger ones than to itself.)"""

DEAD = 1e-6
"""A unit is dead when its standard deviation is at most this share of its mean: constant, for float32."""

_MALFORMED = (TypeError, ValueError, AttributeError)
"""What reading a header stumbles over that says other things than it should."""

_FORMAT = "hf_zipit.moments/2"


@dataclass(eq=False)
class Sums:
    """Count, sum and second moment of rows `[rows, D]`, all about one `shift`.

    Attributes:
        count: n, the number of rows.
        shift: `[D]` float64, subtracted from every row before it is summed.
        total: `[D]` float64, sum of `x - shift`.
        second: `[D, D]` float64, sum of `(x - shift)(x - shift)^T`.
    """

    count: int
    shift: Tensor
    total: Tensor
    second: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Sums:
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone(), torch.zeros(width, width, dtype=torch.float64, device=device))

    def add(self, rows: Tensor) -> None:
        """Add float32 rows `[rows, D]`; they may lie on another device than the sums."""
        for block in rows.split(BLOCK_ROWS):
            if self.count == 0:
                # Rounded to float32, so that subtracting it from float32 rows makes the same shift exactly.
                self.shift = block.mean(0, dtype=torch.float64).float().double().to(self.total.device)
            if block.device.type == "cpu" and block.shape[1] <= NARROW:
                block = block.double()
            centred = block - self.shift.to(block)
            self.count += len(block)
            self.total += centred.sum(0).to(self.total.device)
            self.second += (centred.T @ centred).to(self.second.device)

    def about(self, shift: Tensor) -> Sums:
        """The same sums about another shift."""
        step = self.shift - shift
        total = self.total + self.count * step
        # sum (x - s + e)(x - s + e)^T = second + total e^T + e total'^T, with total' the total about the new shift.
        second = self.second + torch.outer(self.total, step) + torch.outer(step, total)
        return Sums(self.count, shift, total, second)

    def __add__(self, other: Sums) -> Sums:
        if other.count == 0 or self.count == 0:
            return self.copy() if other.count == 0 else other.copy()
        other = other.about(self.shift)
        return Sums(self.count + other.count, self.shift.clone(), self.total + other.total, self.second + other.second)

    def copy(self) -> Sums:
        return Sums(self.count, self.shift.clone(), self.total.clone(), self.second.clone())

    def to(self, device: torch.device | str) -> Sums:
        return Sums(self.count, self.shift.to(device), self.total.to(device), self.second.to(device))

    def take(self, units: Tensor) -> Sums:
        """The sums of some units, in the order given."""
        return Sums(self.count, self.shift[units], self.total[units], self.second[units][:, units])

    def mean(self) -> Tensor:
        return self.shift + self.total / self.count

    def covariance(self) -> Tensor:
        centre = self.total / self.count
        covariance = self.second / self.count - torch.outer(centre, centre)
        return (covariance + covariance.T) / 2

    def dead(self) -> Tensor:
        """`[D]` bool: units that are constant as far as float32 can tell."""
        return self.variance() <= (DEAD * self.mean()).abs().clamp_min(FLOOR).square()

    def correlation(self) -> Tensor:
        alive = ~self.dead()
        std = self.variance().sqrt()
        correlation = self.covariance() / torch.outer(std, std).clamp_min(FLOOR**2)
        return correlation * torch.outer(alive, alive)

    def wrong(self, experts: int) -> str | None:
        """What cannot be right about sums of a number of experts, in a few words; None if nothing is."""
        width = self.total.numel()
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            return f"has the count {self.count!r}"
        if {t.dtype for t in (self.shift, self.total, self.second)} != {torch.float64}:
            return "is not in float64"
        if width % experts or self.shift.shape != (width,) or self.second.shape != (width, width):
            return f"has tensors of {width} units that do not fit {experts} experts and each other"
        finite = all(t.isfinite().all() for t in (self.shift, self.total, self.second))
        return None if finite and (self.second.diagonal() >= 0).all() else "holds sums that no features have"

    def variance(self) -> Tensor:
        return (self.second.diagonal() / self.count - (self.total / self.count).square()).clamp_min(0)


@dataclass(eq=False)
class Moments:
    """What the units of T experts do on the same inputs: sums per product of spaces and per probe.

    Matrices are `[T*d, T*d]` and vectors `[T*d]`, both float64; the units stand expert by expert, in the order of
    `tasks`. Methods that take a `probe` read that place alone; without one they combine all probes of the product.
    They raise `SpecError` for a product that was not observed.

    Attributes:
        tasks: the experts, in order.
        sums: the sums by product and probe.
        fingerprint: what was observed: `experts` (sha256 by task), `data` (sha256), `samples`, `seed`,
            `row_fraction` and the library's `version`.
        device: where sums are added up.
    """

    tasks: tuple[str, ...]
    sums: dict[ProductKey, dict[str, Sums]] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def add(self, key: ProductKey, features: Sequence[Tensor], probe: str = "") -> None:
        """Add rows: one tensor `[rows, d]` per expert, of the same inputs in the same order.

        Raises:
            ExpertError: if the experts' features have different shapes.
        """
        shapes = {task: tuple(f.shape) for task, f in zip(self.tasks, features, strict=True)}
        if len(set(shapes.values())) > 1:
            raise ExpertError(f"The experts' features at {probe or key} have different shapes: {shapes}.")
        if len({f.device for f in features}) > 1:  # experts that a device_map has placed differently
            features = [f.cpu() for f in features]
        rows = torch.cat([f.float() for f in features], dim=1)
        found = self.sums.setdefault(key, {})
        if probe not in found:
            found[probe] = Sums.empty(rows.shape[1], self.device)
        found[probe].add(rows)

    def merge(self, other: Moments) -> Moments:
        """The moments of both passes' data together: a new object, as if one pass had seen all of it.

        Raises:
            DataError: if the moments are of other tasks or other experts.
        """
        if self.tasks != other.tasks:
            raise DataError(f"Moments of the tasks {list(self.tasks)} and of {list(other.tasks)} cannot be added.")
        _check_experts(self.fingerprint.get("experts"), other.fingerprint.get("experts"), "The moments to be added")
        sums = {key: dict(found) for key, found in self.sums.items()}
        for key, found in other.sums.items():
            for probe, values in found.items():
                mine = sums.setdefault(key, {}).get(probe)
                sums[key][probe] = values.copy() if mine is None else mine + values
        return Moments(self.tasks, sums, _merge_fingerprints(self.fingerprint, other.fingerprint), self.device)

    def select(self, tasks: Sequence[str]) -> Moments:
        """The moments of some of the experts, in another order if need be, on the same data.

        Raises:
            DataError: if one of the tasks was not observed.
        """
        if missing := [task for task in tasks if task not in self.tasks]:
            raise DataError(f"The moments are of the tasks {list(self.tasks)}; {missing} were not observed.")
        places = torch.tensor([self.tasks.index(task) for task in tasks])
        sums: dict[ProductKey, dict[str, Sums]] = {}
        for key, found in self.sums.items():
            units = torch.arange(self.size(key) * len(self.tasks)).reshape(len(self.tasks), -1)[places].reshape(-1)
            sums[key] = {probe: values.take(units) for probe, values in found.items()}
        experts = self.fingerprint.get("experts", {})
        fingerprint = {**self.fingerprint, "experts": {task: experts[task] for task in tasks if task in experts}}
        return Moments(tuple(tasks), sums, fingerprint)

    def of(self, experts: Mapping[str, str], what: str = "The moments") -> Moments:
        """These moments, checked to be of the experts with the fingerprints given (by task), and in their order.

        Raises:
            DataError: if they were taken from other experts.
        """
        _check_experts(self.fingerprint.get("experts"), experts, what)
        return self if self.tasks == tuple(experts) else self.select(tuple(experts))

    def at(self, probes: Mapping[ProductKey, Sequence[str]]) -> Moments:
        """The moments of some products at some of their probes: what a merge of less depth reads.

        Raises:
            DataError: if one of them was not observed.
        """
        for key, names in probes.items():
            if unseen := [name for name in names if name not in self.sums.get(key, {})]:
                raise DataError(
                    f"The moments hold nothing about {' x '.join(key)} at {unseen[0]}: they were taken for less depth "
                    "or another architecture, so observe again."
                )
        sums = {key: {name: self.sums[key][name] for name in names} for key, names in probes.items()}
        return Moments(self.tasks, sums, self.fingerprint, self.device)

    def keys(self) -> tuple[ProductKey, ...]:
        """The products that were observed."""
        return tuple(self.sums)

    def probes(self, key: ProductKey) -> tuple[str, ...]:
        """Where a product was observed, as `module:where:axis`."""
        if key not in self.sums:
            observed = [" x ".join(other) for other in self.sums]
            raise SpecError(f"There are no moments of {' x '.join(key)}; observed were {observed}.")
        return tuple(self.sums[key])

    def size(self, key: ProductKey) -> int:
        """d, the units of one expert."""
        return self._of(key)[0].total.numel() // len(self.tasks)

    def count(self, key: ProductKey, probe: str | None = None) -> int:
        """The number of rows, summed over the probes."""
        return sum(values.count for values in self._of(key, probe))

    def mean(self, key: ProductKey, probe: str | None = None) -> Tensor:
        """`[T*d]`; over several probes, the mean of their means."""
        return _average([values.mean() for values in self._of(key, probe)])

    def std(self, key: ProductKey, probe: str | None = None) -> Tensor:
        """`[T*d]`: the root of the covariance's diagonal."""
        return _average([values.variance() for values in self._of(key, probe)]).sqrt()

    def covariance(self, key: ProductKey, probe: str | None = None) -> Tensor:
        """Population covariance `[T*d, T*d]`, exactly symmetric; over several probes, see `pooled_covariance`."""
        return _average([values.covariance() for values in self._of(key, probe)])

    def pooled_covariance(self, key: ProductKey) -> Tensor:
        """The equal-weight mean of the probes' covariances, for methods that need scales and not only correlations.

        It is taken *within* probes: a unit whose mean drifts from layer to layer does not vary by that.
        """
        return self.covariance(key)

    def correlation(self, key: ProductKey, probe: str | None = None) -> Tensor:
        """R = C / max(s s^T, 1e-7), `[T*d, T*d]`; over several probes, the equal-weight mean of their correlations.

        A dead unit has correlation 0 with everything, itself included.
        """
        return _average([values.correlation() for values in self._of(key, probe)])

    def dead(self, key: ProductKey, probe: str | None = None) -> Tensor:
        """`[T*d]` bool: the units that are constant at every probe."""
        return torch.stack([values.dead() for values in self._of(key, probe)]).all(0)

    def to(self, device: torch.device | str) -> Moments:
        sums = {key: {probe: values.to(device) for probe, values in found.items()} for key, found in self.sums.items()}
        return Moments(self.tasks, sums, self.fingerprint, device)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; it replaces an older one only when it is complete.

        Raises:
            OutputError: if the file cannot be written.
        """
        path = Path(path)
        entries, tensors = [], {}
        for key, found in self.sums.items():
            for probe, values in found.items():
                for name in ("shift", "total", "second"):
                    tensors[f"{len(entries)}.{name}"] = getattr(values, name).cpu().contiguous()
                entries.append({"key": list(key), "probe": probe, "count": values.count})
        header = {"format": _FORMAT, "tasks": self.tasks, "fingerprint": self.fingerprint, "sums": entries}
        header["sha256"] = _checksum(header, tensors)
        try:
            with replacing(path) as beside:
                save_file(tensors, beside, metadata={"hf_zipit": json.dumps(header)})
        except SafetensorError as error:
            raise OutputError(f"The moments cannot be written to {path}: {error}.") from error
        return path

    @classmethod
    def load(cls, path: str | Path, experts: Mapping[str, str] | None = None) -> Moments:
        """Read a file of `save`.

        With what `fingerprint_experts` says of the experts to be merged, the moments are checked to be theirs: `of`.

        Raises:
            DataError: if there is no such file, it is not a whole moments file or was changed since it was written, or
                it was taken from other experts.
        """
        path = Path(path)
        try:
            if not path.is_file():
                raise DataError(f"There is no moments file at {path}.")
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["hf_zipit"])
                if header["format"] != _FORMAT:
                    raise DataError(f"{path} has the format {header['format']}; this version reads {_FORMAT}.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if header["sha256"] != _checksum(header, tensors):
                raise DataError(f"{path} was changed since it was written (its checksum differs); observe again.")
            moments = cls(tuple(header["tasks"]), {}, header["fingerprint"])
            for i, entry in enumerate(header["sums"]):
                sums = Sums(entry["count"], *(tensors[f"{i}.{name}"] for name in ("shift", "total", "second")))
                if wrong := sums.wrong(len(moments.tasks)):
                    raise DataError(f"{path} is not a whole moments file: {' x '.join(entry['key'])} {wrong}.")
                moments.sums.setdefault(tuple(entry["key"]), {})[entry["probe"]] = sums
            if set(moments.fingerprint["experts"]) != set(moments.tasks):
                raise DataError(f"{path} does not say which weights its experts had; observe again.")
        except DataError:
            raise
        except Exception as error:  # whatever its readers stumble over in a file that is none
            raise DataError(f"{path} is not a complete moments file: {first_line(error)}.") from error
        return moments if experts is None else moments.of(experts, f"The moments in {path}")

    def _of(self, key: ProductKey, probe: str | None = None) -> list[Sums]:
        probes = self.probes(key)
        if probe is not None and probe not in probes:
            raise SpecError(f"{' x '.join(key)} was not observed at {probe}; its probes are {list(probes)}.")
        found = {name: self.sums[key][name] for name in (probes if probe is None else (probe,))}
        if empty := [name for name, values in found.items() if values.count == 0]:
            raise SpecError(f"{' x '.join(key)} has no rows at {empty[0]}: nothing was observed there.")
        return list(found.values())


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of everything in a moments file."""
    told = json.dumps({key: value for key, value in header.items() if key != "sha256"}, sort_keys=True)
    return digest_tensors(((name, tensors[name]) for name in sorted(tensors)), label=told)


def _average(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:  # not stacked: a space of 6,144 units has 300 MB per probe
        total = total + tensor
    return total / len(tensors)


def _check_experts(found: Mapping[str, str] | None, expected: Mapping[str, str] | None, what: str) -> None:
    if found is None or expected is None:
        return
    if set(found) != set(expected):
        raise DataError(f"{what} are of the tasks {sorted(found)}, not of {sorted(expected)}: observe again.")
    if changed := [task for task in expected if found[task] != expected[task]]:
        raise DataError(f"{what} are of other experts: the weights of {changed} differ, so observe again.")


def _merge_fingerprints(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """What both passes agree on stays; counts of samples add, other differences are listed."""
    merged: dict[str, Any] = {}
    for name in sorted({*one, *two}):
        a, b = one.get(name), two.get(name)
        if name == "samples":
            merged[name] = (a or 0) + (b or 0)
        elif name == "experts":
            merged[name] = a or b
        elif name == "data":
            merged[name] = digest_strings(sorted(str(x) for x in (a, b)))
        else:
            merged[name] = a if a == b else [a, b]
    return merged
