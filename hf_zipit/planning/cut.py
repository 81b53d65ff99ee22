"""Where the trunk ends: which tensors are merged, which stay each task's own, and where a branch reads the trunk.

Everything that runs before the cut is the trunk. A branch is an expert's own modules from the cut on, in its own
basis; it reads the trunk's values through U_t. With depth 1 only the task heads stay apart, with depth 0 nothing is
shared.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_zipit.errors import RecipeError, SpecError
from hf_zipit.symmetry.ops import is_within
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import AxisLabel, Crossing, MergeSpec, Place, Probe, ProductKey, product_key

NOT_IN_TRUNK = "it is not in the trunk"
"""What fixes a space that only branches have."""


@dataclass(frozen=True)
class ReadPoint:
    """A place where a branch reads a value of the trunk.

    Attributes:
        target: the module of the branch whose first input it is, or the output field (`exit`).
        axis: the axis of that tensor.
        label: what the axis is.
    """

    target: str
    axis: int
    label: AxisLabel

    @property
    def key(self) -> ProductKey:
        """The names of its spaces."""
        return product_key(self.label)


@dataclass(frozen=True)
class Cut:
    """The division of a model at a depth.

    Attributes:
        blocks: per tower, the number of blocks in the trunk.
        depth: the share of all blocks that is in the trunk.
        trunk: names of the merged tensors.
        shared: paths of the largest modules that lie wholly in the trunk.
        entries: where branches read the trunk.
        exits: outputs of the model that the trunk makes itself.
    """

    blocks: tuple[int, ...]
    depth: float
    trunk: frozenset[str]
    shared: tuple[str, ...]
    entries: tuple[ReadPoint, ...]
    exits: tuple[ReadPoint, ...]

    def spaces(self, spec: MergeSpec) -> frozenset[str]:
        """Movable spaces that some tensor of the trunk has."""
        labels = (label for name in self.trunk for label in spec.axes.get(name, ()))
        return frozenset(name for label in labels for name in product_key(label) if spec.movable(name))

    def trunk_spec(self, spec: MergeSpec) -> MergeSpec:
        """The spec as the later stages see it: spaces that only branches have are fixed, and nobody looks there."""
        merged = self.spaces(spec)
        others = [name for name in spec.spaces if spec.movable(name) and name not in merged]
        return replace(spec.with_fixed(others, NOT_IN_TRUNK), probes=self._probes(spec, merged))

    def _probes(self, spec: MergeSpec, merged: frozenset[str]) -> tuple[Probe, ...]:
        """The probes in the trunk; of a product that only branches read, the first one, the nearest to the cut."""
        owners = {name.rpartition(".")[0] for name in self.trunk}
        whole = list(self.blocks) == tower_lengths(spec)
        probes = [probe for probe in spec.probes if any(name in merged for name in probe.key)]
        kept = {p for p in probes if p.module in owners or (whole and p.where == "input")}
        seen = {probe.key for probe in kept}
        for probe in probes:
            if probe.key not in seen:
                seen.add(probe.key)
                kept.add(probe)
        return tuple(probe for probe in probes if probe in kept)


def towers(spec: MergeSpec) -> list[list[str]]:
    """The paths of every tower's blocks."""
    count = max((block.tower for block in spec.blocks), default=-1) + 1
    return [[block.path for block in spec.blocks if block.tower == tower] for tower in range(count)]


def tower_lengths(spec: MergeSpec) -> list[int]:
    return [len(paths) for paths in towers(spec)]


def blocks_in_trunk(spec: MergeSpec, depth: float | str) -> tuple[int, ...]:
    """How many blocks of every tower a depth puts into the trunk.

    Args:
        spec: the model's spec.
        depth: a share of the blocks from 0 to 1 (halves are rounded up), or the path of the block before which the
            trunk ends. A model with two towers is cut at the same share of both.

    Raises:
        RecipeError: for a share outside 0..1 or a path that is no block.
    """
    lengths = tower_lengths(spec)
    if isinstance(depth, str):
        paths = [block.path for block in spec.blocks]
        if depth not in paths:
            close = difflib.get_close_matches(depth, paths, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; its blocks are {', '.join(paths) or 'none'}"
            raise RecipeError(f"the depth {depth!r} is no block of {spec.architecture}{hint}")
        own = next(tower for tower in towers(spec) if depth in tower)
        depth = own.index(depth) / len(own)
    if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
        raise RecipeError(f"the depth must be a share from 0 to 1 or the path of a block, not {depth!r}")
    counts = [int(depth * length + 0.5) for length in lengths]
    if any(counts) and not all(counts):  # a short tower beside a long one
        counts = [max(1, count) for count in counts]
    return tuple(counts)


def cut_model(model: nn.Module, spec: MergeSpec, depth: float | str) -> Cut:
    """Divide a model at a depth.

    Raises:
        RecipeError: if the depth is no share and no block.
        SpecError: if a branch would read the trunk elsewhere than at the cut, or both would use the same tensor.
    """
    counts = blocks_in_trunk(spec, depth)
    lengths = tower_lengths(spec)
    nothing = not any(counts) if lengths else depth == 0
    whole = not nothing and all(count == length for count, length in zip(counts, lengths, strict=True))

    def in_trunk(place: Place) -> bool:
        reached = zip(place.blocks, counts, lengths, strict=True)
        return not (nothing or place.head) and all(last < n or n == length for last, n, length in reached)

    _check_used_on_one_side(spec, in_trunk)
    trunk = _trunk_names(spec, list(model_tensors(model)), in_trunk, whole)
    total = sum(lengths)
    return Cut(
        blocks=counts,
        depth=sum(counts) / total if total else float(not nothing),
        trunk=trunk,
        shared=_shared_modules(model, trunk),
        entries=_entries(model, spec, in_trunk, _readouts(spec, counts)),
        exits=_exits(spec, in_trunk),
    )


InTrunk = Callable[[Place], bool]


def _check_used_on_one_side(spec: MergeSpec, in_trunk: InTrunk) -> None:
    for name, first in spec.first_places.items():
        if in_trunk(first) and not in_trunk(spec.places[name]):
            raise SpecError(
                f"{spec.architecture} cannot be cut here: {name} is used both before and after the cut; choose "
                "another depth"
            )


def _trunk_names(spec: MergeSpec, names: Sequence[str], in_trunk: InTrunk, whole: bool) -> frozenset[str]:
    """The tensors that the trunk uses, and those that nothing reads but whose module is in the trunk."""
    trunk = {name for name in names if name in spec.places and in_trunk(spec.places[name])}
    branch = {name for name in names if name in spec.places} - trunk
    idle = [name for name in names if name in spec.unused and not any(_under(name, head) for head in spec.head)]
    if trunk:
        for name in idle:
            module = name.rpartition(".")[0]
            beside_trunk = any(_under(other, module) for other in trunk)
            if whole or (beside_trunk and not any(_under(other, module) for other in branch)):
                trunk.add(name)
    return frozenset(trunk)


def _under(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _shared_modules(model: nn.Module, trunk: frozenset[str]) -> tuple[str, ...]:
    """The largest callable modules all of whose tensors are in the trunk. The model itself is never one of them."""
    shared: list[str] = []

    def walk(path: str, module: nn.Module) -> None:
        names = [n for n, _ in module.named_parameters(path, remove_duplicate=False)]
        names += [n for n, _ in module.named_buffers(path, remove_duplicate=False)]
        if path and names and all(name in trunk for name in names) and not isinstance(module, nn.ModuleList):
            shared.append(path)
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return tuple(shared)


def _readouts(spec: MergeSpec, counts: Sequence[int]) -> frozenset[str]:
    """Modules through which a branch may read the trunk: the first block of every tower's branch, and the head."""
    first = (path for paths, count in zip(towers(spec), counts, strict=True) for path in paths[count : count + 1])
    return frozenset({*spec.head, *first})


def _entries(model: nn.Module, spec: MergeSpec, in_trunk: InTrunk, readouts: frozenset[str]) -> tuple[ReadPoint, ...]:
    """Where a branch takes over a value that moves.

    Raises:
        SpecError: if it does so elsewhere than at a readout, or one module takes two values.
    """
    through: dict[str, list[tuple[Crossing, int]]] = {}
    for crossing in spec.crossings:
        moving = any(_moves(label, spec) for label in crossing.axes)
        if not moving or not in_trunk(crossing.made) or in_trunk(crossing.read):
            continue
        # A list of heads is never run itself, only what is in it.
        depth = next((i for i, path in enumerate(crossing.stack) if any(is_within(path, r) for r in readouts)), None)
        if depth is None:
            reader = crossing.stack[-1] if crossing.stack and crossing.stack[-1] else "the model itself"
            raise SpecError(
                f"{spec.architecture} cannot be cut here: {reader} reads a value of the trunk beside the cut; choose "
                "another depth, or declare it as part of the head in an adapter"
            )
        through.setdefault(crossing.stack[depth], []).append((crossing, depth))
    return tuple(dict.fromkeys(point for path in through for point in _points(model, spec, path, through[path])))


def _points(
    model: nn.Module, spec: MergeSpec, path: str, found: Sequence[tuple[Crossing, int]]
) -> Iterator[ReadPoint]:
    """Where the module `path` reads the values that cross into it: through its first argument, if it is one value.

    A head that reads several (those of every stage) hands each of them to a module of its own, which is entered
    instead; or they are one sequence of values in the same units.
    """
    moving = {
        crossing.value: [(axis, label) for axis, label in enumerate(crossing.axes) if _moves(label, spec)]
        for crossing, _ in found
    }
    # Beside others of its form, a value is not surely what comes first, and surely not all that is in a sequence.
    others = {value for crossing, depth in found for value in crossing.beside[depth]} - {*moving}
    sequence = _takes_a_sequence(model.get_submodule(path))
    deeper = others and (sequence or all(depth + 1 < len(crossing.stack) for crossing, depth in found))
    if len(moving) == 1 and not deeper and all(len(axes) == 1 for axes in moving.values()):
        yield from (ReadPoint(path, *axes[0]) for axes in moving.values())
        return
    inner: dict[str, list[tuple[Crossing, int]]] = {}
    points = {ReadPoint(path, *place) for places in moving.values() for place in places}
    for crossing, depth in found:
        if depth + 1 == len(crossing.stack):
            if len(points) == 1 and sequence and not others:
                yield points.pop()
                return
            raise SpecError(
                f"{spec.architecture} cannot be cut before {path}: it reads a value of the trunk beside others; "
                "choose another depth"
            )
        inner.setdefault(crossing.stack[depth + 1], []).append((crossing, depth + 1))
    for module, own in inner.items():
        yield from _points(model, spec, module, own)


def _takes_a_sequence(module: nn.Module) -> bool:
    """Whether the first argument of a module is declared to be a list or a tuple."""
    first = next(iter([*inspect.signature(type(module).forward).parameters.values()][1:]), None)
    return (
        first is not None and re.match(r"(typing\.)?(list|tuple|sequence)\b", str(first.annotation), re.I) is not None
    )


def _exits(spec: MergeSpec, in_trunk: InTrunk) -> tuple[ReadPoint, ...]:
    return tuple(
        ReadPoint(field, axis, label)
        for field, axes in spec.outputs.items()
        if in_trunk(spec.output_places[field])
        for axis, label in enumerate(axes)
        if _moves(label, spec)
    )


def _moves(label: AxisLabel, spec: MergeSpec) -> bool:
    return any(map(spec.movable, product_key(label)))
