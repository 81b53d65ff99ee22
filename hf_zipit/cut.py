"""Where the trunk ends: which tensors are merged, which stay each task's own, and where a branch reads the trunk.

Everything that runs before the cut is the trunk. A branch is an expert's own modules from the cut on, in its own
basis; it reads the trunk's values through U_t. With depth 1 only the task heads stay apart, with depth 0 nothing is
shared.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from hf_zipit.errors import RecipeError, SpecError
from hf_zipit.symmetry.spaces import AxisLabel, Crossing, Place, Probe, ProductKey, Trace, product_key


@dataclass(frozen=True)
class Entry:
    """A place where a branch reads a value of the trunk.

    Attributes:
        target: the module of the branch whose first input it is, or the output field (`exit`).
        axis: the axis of that tensor.
        key: the product of spaces that the axis is.
    """

    target: str
    axis: int
    key: ProductKey


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
    entries: tuple[Entry, ...]
    exits: tuple[Entry, ...]

    def spaces(self, spec: Trace) -> frozenset[str]:
        """Movable spaces that some tensor of the trunk has."""
        labels = (label for name in self.trunk for label in spec.axes.get(name, ()))
        return frozenset(f.space for label in labels for f in label if spec.movable(f.space))

    def probes(self, spec: Trace) -> tuple[Probe, ...]:
        """The probes at which the trunk's spaces show in the trunk."""
        merged = self.spaces(spec)
        owners = {name.rpartition(".")[0] for name in self.trunk}
        whole = not any(made < total for made, total in zip(self.blocks, tower_lengths(spec), strict=True))
        return tuple(
            probe
            for probe in spec.probes
            if any(name in merged for name in probe.key)
            and (probe.module in owners or (whole and probe.where == "input"))
        )


def tower_lengths(spec: Trace) -> list[int]:
    count = max((block.tower for block in spec.blocks), default=-1) + 1
    return [sum(block.tower == tower for block in spec.blocks) for tower in range(count)]


def blocks_in_trunk(spec: Trace, depth: float | str) -> tuple[int, ...]:
    """How many blocks of every tower a depth puts into the trunk.

    Args:
        spec: the model's spec.
        depth: a share of the blocks from 0 to 1, or the path of the block before which the trunk ends. A model with
            two towers is cut at the same share of both.

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
        block = spec.blocks[paths.index(depth)]
        before = [b.path for b in spec.blocks if b.tower == block.tower].index(depth)
        depth = before / lengths[block.tower]
    if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
        raise RecipeError(f"the depth must be a share from 0 to 1 or the path of a block, not {depth!r}")
    counts = [round(depth * length) for length in lengths]
    if any(counts) and not all(counts):  # a short tower beside a long one
        counts = [max(1, count) for count in counts]
    return tuple(counts)


def cut_model(model: nn.Module, spec: Trace, depth: float | str) -> Cut:
    """Divide a model at a depth.

    Raises:
        RecipeError: if the depth is no share and no block.
        SpecError: if a branch would read the trunk elsewhere than at the cut, or blocks share their weights.
    """
    counts = blocks_in_trunk(spec, depth)
    lengths = tower_lengths(spec)
    nothing = not any(counts) if lengths else depth == 0
    whole = not nothing and all(count == length for count, length in zip(counts, lengths, strict=True))

    def in_trunk(place: Place) -> bool:
        return not nothing and not place.head and all(
            reached < count or count == length
            for reached, count, length in zip(place.blocks, counts, lengths, strict=True)
        )

    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    names += [n for n, _ in model.named_buffers(remove_duplicate=False)]
    # A tensor that nothing reads goes where the rest of its module goes, in the end with the branches.
    trunk = {name for name in names if name in spec.places and in_trunk(spec.places[name])}
    used_in_branch = {name for name in names if name in spec.places and name not in trunk}
    for name in names:
        if name in spec.unused and not nothing and not _in_head(name, spec):
            module = name.rpartition(".")[0]
            siblings_trunk = any(_under(other, module) for other in trunk)
            siblings_branch = any(_under(other, module) for other in used_in_branch)
            if (siblings_trunk and not siblings_branch) or whole:
                trunk.add(name)
    entries, exits = _entries(spec, in_trunk, counts, lengths)
    total = sum(lengths)
    return Cut(
        blocks=counts,
        depth=sum(counts) / total if total else float(not nothing),
        trunk=frozenset(trunk),
        shared=_shared_modules(model, frozenset(trunk)),
        entries=entries,
        exits=exits,
    )


def _under(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _in_head(name: str, spec: Trace) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in spec.head)


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


def _entries(spec: Trace, in_trunk, counts, lengths) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:  # noqa: ANN001
    first = {
        path
        for tower, count in enumerate(counts)
        for path in [[b.path for b in spec.blocks if b.tower == tower][count : count + 1]]
        for path in path
    }
    entries: dict[Entry, None] = {}
    for crossing in spec.crossings:
        if in_trunk(crossing.made) and not in_trunk(crossing.read):
            doors = [path for path in crossing.stack if path in first or path in spec.head]
            for axis, label in enumerate(crossing.axes):
                if _moves(label, spec):
                    if not doors:
                        raise SpecError(_cannot_cut(spec, crossing))
                    entries[Entry(doors[0], axis, product_key(label))] = None
    for entry in entries:
        if sum(other.target == entry.target for other in entries) > 1:
            raise SpecError(
                f"{spec.architecture} cannot be cut before {entry.target}: it reads more than one value of the trunk; "
                "choose another depth"
            )
    exits = [
        Entry(field, axis, product_key(label))
        for field, axes in spec.outputs.items()
        if in_trunk(spec.output_places[field])
        for axis, label in enumerate(axes)
        if _moves(label, spec)
    ]
    return tuple(entries), tuple(exits)


def _moves(label: AxisLabel, spec: Trace) -> bool:
    return any(spec.movable(factor.space) for factor in label)


def _cannot_cut(spec: Trace, crossing: Crossing) -> str:
    return (
        f"{spec.architecture} cannot be cut here: {crossing.stack[-1] or 'the model itself'} reads a value of the trunk "
        "beside the cut; choose another depth, or declare it as part of the head in an adapter"
    )
