"""Ops that only move, repeat, cut or join what is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import fx

from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    ONES,
    PERMUTATION,
    Value,
    input_shape,
    known_size,
    op_name,
    overload,
    rule,
    shape_of,
    without,
)

EVERY_FEW = "one of every few units is taken"


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", numbered=True)
def reshape(run: Interpreter, node: fx.Node, x: Value, *args: Any, **__: Any) -> Any:
    if overload(node) == "dtype":  # the same bits read as another type
        return run.unknown(node, x)
    axes = run.atoms.regroup(x.axes, shape_of(node), f"the op {op_name(node)} cuts it in uneven parts")
    return Value(axes, x.names)


rule("view_as", "reshape_as")(reshape)


@rule("transpose", "swapaxes")
def transpose(run: Interpreter, node: fx.Node, x: Value, a: int, b: int) -> Value:
    axes = list(x.axes)
    axes[a], axes[b] = axes[b], axes[a]
    return Value(axes)


@rule("t", "mT")
def swap_last(run: Interpreter, node: fx.Node, x: Value) -> Value:
    return Value([*x.axes[:-2], *x.axes[:-3:-1]])


@rule("permute")
def permute(run: Interpreter, node: fx.Node, x: Value, order: Sequence[int]) -> Value:
    return Value(x.axes[i] for i in order)


@rule("numpy_T")
def reverse(run: Interpreter, node: fx.Node, x: Value) -> Value:
    return Value(x.axes[::-1])


@rule("movedim")
def movedim(run: Interpreter, node: fx.Node, x: Value, source: Any, target: Any) -> Any:
    if not (isinstance(source, int) and isinstance(target, int)):
        return run.unknown(node, x)
    axes = list(x.axes)
    axes.insert(target % len(axes), axes.pop(source))
    return Value(axes)


@rule("expand", "expand_as", "broadcast_to")
def expand(run: Interpreter, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    """A repeated axis holds equal copies: any order of them is the same. Grouped-query attention shows up as this."""
    shape = shape_of(node)
    padded = [()] * (len(shape) - len(x.axes)) + x.axes
    return Value(axis or run.atoms.fresh(n, PERMUTATION) for axis, n in zip(padded, shape, strict=True))


@rule("repeat")
def repeat(run: Interpreter, node: fx.Node, x: Value, repeats: Sequence[int]) -> Value:
    padded = [()] * (len(repeats) - len(x.axes)) + x.axes
    return Value(run.atoms.fresh(n, PERMUTATION) + axis for axis, n in zip(padded, repeats, strict=True))


@rule("tile")
def tile(run: Interpreter, node: fx.Node, x: Value, repeats: Sequence[int]) -> Value:
    return repeat(run, node, x, [1] * (len(x.axes) - len(repeats)) + list(repeats))


@rule("repeat_interleave")
def repeat_interleave(run: Interpreter, node: fx.Node, x: Value, repeats: Any, dim: Any = None, **__: Any) -> Any:
    if not isinstance(repeats, int) or dim is None:
        return run.unknown(node, x, repeats)
    axes = list(x.axes)
    axes[dim] = axes[dim] + run.atoms.fresh(repeats, PERMUTATION)
    return Value(axes)


@rule("select")
def select(run: Interpreter, node: fx.Node, x: Value, dim: int, *_: Any) -> Value:
    run.atoms.restrict(x.axes[dim], FIXED, "single units are selected")
    return Value(without(x, [dim % len(x.axes)]))


def replaced(run: Interpreter, node: fx.Node, x: Value, dim: int, why: str) -> Value:
    """A value whose axis `dim` holds other units than before."""
    run.atoms.restrict(x.axes[dim], FIXED, why)
    run.parted(without(x, [dim % len(x.axes)]))
    axes = list(x.axes)
    axes[dim] = run.atoms.fresh(shape_of(node)[dim], FIXED, why)
    return Value(axes)


@rule("slice", "narrow")
def cut_out(run: Interpreter, node: fx.Node, x: Value, dim: int = 0, start: Any = 0, *end_and_step: Any) -> Value:
    size, kept = input_shape(node)[dim], shape_of(node)[dim]
    if kept == size:
        return Value(x.axes)
    if isinstance(start, Value):  # where it starts is in a tensor
        return replaced(run, node, x, dim, "a part of it is sliced off")
    start = max(start + size, 0) if start and start < 0 else start or 0
    if not kept:  # nothing is read
        axes = list(x.axes)
        axes[dim] = run.atoms.fresh(0)
        return Value(axes)
    step = end_and_step[1] if len(end_and_step) > 1 else 1
    constant = not any(isinstance(at, fx.Node) for at in node.args[2:])
    if constant and step > 1 and start < step and size % step == 0 and kept == size // step:
        each = run.atoms.fresh(kept)  # one unit of every `step`: what is numbered is which of them
        run.atoms.tie(x.axes[dim], each + run.atoms.fresh(step, FIXED, EVERY_FEW), EVERY_FEW)
        axes = list(x.axes)
        axes[dim] = run.atoms.resolve(each)
        return Value(axes)
    if step != 1 or not constant:
        return replaced(run, node, x, dim, "a part of it is sliced off")
    sizes = [n for n in (start, kept, size - start - kept) if n]
    axes = list(x.axes)
    (axes[dim],) = run.atoms.take(x.axes[dim], sizes, [1 if start else 0], "a part of it is sliced off")
    return Value(axes)


@rule("index_select")
def index_select(run: Interpreter, node: fx.Node, x: Value, dim: int, indices: Value) -> Value:
    for axis in indices.axes:
        run.atoms.restrict(axis, FIXED, "it is an index")
    return replaced(run, node, x, dim, "rows are looked up by index")


@rule("split", "chunk", "split_with_sizes", "unbind", "tensor_split")
def pieces(run: Interpreter, node: fx.Node, x: Value, *args: Any) -> Any:
    unbinding = op_name(node) == "unbind"
    position = 0 if unbinding else 1
    dim = args[position] if len(args) > position else 0
    results = node.meta["val"]
    if len(results) == 1 and not unbinding:
        return (Value(x.axes),)
    if unbinding:
        run.atoms.restrict(x.axes[dim], FIXED, "it is split in pieces")
        rest = without(x, [dim % len(x.axes)])
        run.parted(rest)
        return tuple(Value(rest) for _ in results)
    out: list[Any] = [None] * len(results)
    read = sorted({user.args[1] for user in node.users})  # type: ignore[type-var]
    parts = run.atoms.take(
        x.axes[dim], [known_size(result.shape[dim]) for result in results], read, "it is split in pieces"
    )
    for i, part in zip(read, parts, strict=True):
        axes = list(x.axes)
        axes[dim] = part
        out[i] = Value(axes)  # type: ignore[index]
    return tuple(out)


@rule("cat", "concat", "concatenate", "stack")
def join(run: Interpreter, node: fx.Node, values: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(shape_of(node))
    rank = max(len(value.axes) for value in values)
    values = [value for value in values if len(value.axes) == rank]  # those left out are empty: a new cache
    kept, joined = (
        [list(value.axes) for value in values],
        run.atoms.fresh(shape_of(node)[dim], FIXED, "a concatenation"),
    )
    if op_name(node) != "stack":
        joined = run.atoms.join([axes.pop(dim) for axes in kept], "a concatenation")
    for axes in kept[1:]:
        for left, right in zip(kept[0], axes, strict=True):
            run.atoms.tie(left, right, "concatenated tensors do not fit")
    if op_name(node) == "stack":
        run.parted(kept[0])
    return Value([*kept[0][:dim], joined, *kept[0][dim:]])


@rule("constant_pad_nd", "pad")
def pad(run: Interpreter, node: fx.Node, x: Value, amounts: Sequence[int], *_: Any) -> Value:
    padded = {len(x.axes) - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    run.parted(without(x, padded))
    out = []
    for i, (axis, size) in enumerate(zip(x.axes, shape_of(node), strict=True)):
        run.atoms.restrict(axis, FIXED if i in padded else ONES, "it is padded")  # with one number everywhere
        out.append(run.atoms.fresh(size, FIXED, "it is padded") if i in padded else axis)
    return Value(out)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest3d",
      "upsample_trilinear3d", "_upsample_nearest_exact2d", "upsample_nearest2d", "upsample_bilinear2d",
      "upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa")  # fmt: skip
def resample(run: Interpreter, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    spatial = int(re.search(r"([123])d", op_name(node))[1])  # type: ignore[index]
    lead = x.axes[:-spatial]
    for axis in x.axes[-spatial:]:
        run.atoms.restrict(axis, FIXED, "it is resampled")
    if "max" in op_name(node):
        for axis in lead:
            run.atoms.restrict(axis, PERMUTATION)
    run.parted(lead)
    return Value([*lead, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[-spatial:])])


@rule("grid_sampler")
def sampled(run: Interpreter, node: fx.Node, x: Value, grid: Value, *_: Any) -> Value:
    """An image at places, `[samples, channels, height, width]` at `[samples, height, width, 2]`."""
    samples, channels, *places = x.axes
    run.atoms.tie(samples, grid.axes[0], "samples do not fit")
    for axis in (*places, *grid.axes[1:]):
        run.atoms.restrict(axis, FIXED, "it is resampled")
    run.parted([samples, channels])
    return Value([samples, channels, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[2:])])


@rule("im2col")
def windows(run: Interpreter, node: fx.Node, x: Value, *_: Any) -> Value:
    """The windows of a convolution, side by side: `[samples, channels x places of a kernel, windows]`."""
    samples, channels, *places = x.axes
    for axis in places:
        run.atoms.restrict(axis, FIXED, "a window slides over it")
    run.parted([samples, channels])
    kernel = shape_of(node)[1] // run.atoms.size(channels)
    inside = run.atoms.fresh(kernel, FIXED, "a kernel's place")
    return Value([samples, channels + inside, run.atoms.fresh(shape_of(node)[2], FIXED, "positions")])


@rule("col2im")
def folded(run: Interpreter, node: fx.Node, x: Value, *_: Any) -> Value:
    """The inverse of `im2col`, overlapping windows added up."""
    samples, channels, places = x.axes
    kept = run.atoms.fresh(shape_of(node)[1])
    kernel = run.atoms.size(channels) // run.atoms.size(kept)
    run.atoms.tie(channels, kept + run.atoms.fresh(kernel, FIXED, "a kernel's place"), "channels do not fit")
    run.atoms.restrict(places, FIXED, "a window slides over it")
    run.parted([samples, kept])
    return Value([samples, kept, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[2:])])


@rule("as_strided")
def strided(run: Interpreter, node: fx.Node, x: Value, size: Sequence[int], stride: Sequence[int], *start: Any) -> Any:
    """Windows that share memory (Longformer's chunks). Axes at both ends that stay as they are are untouched by it."""
    shape, source = input_shape(node), node.args[0].meta["val"]  # type: ignore[union-attr]
    strides, offset = list(source.stride()), source.storage_offset()
    if start and start[0] not in (None, offset):
        return run.unknown(node, x)
    before, after = list(zip(shape, strides, strict=True)), list(zip(size, stride, strict=True))
    first = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    most = min(len(before), len(after)) - first
    last = next((i for i in range(most) if before[-1 - i] != after[-1 - i]), most)
    middle, windows = before[first : len(before) - last], after[first : len(after) - last]
    if not _addresses(windows) <= _addresses(middle):
        return run.unknown(node, x)
    for axis in x.axes[first : len(x.axes) - last]:
        run.atoms.restrict(axis, FIXED, "a window slides over it")
    kept = x.axes[:first], x.axes[len(x.axes) - last :]
    run.parted([*kept[0], *kept[1]])
    return Value([*kept[0], *(run.atoms.fresh(n, FIXED, "a window's place") for n, _ in windows), *kept[1]])


def _addresses(axes: Sequence[tuple[int, int]]) -> set[int]:
    """Where in memory the entries of axes with some sizes and strides stand."""
    found = {0}
    for size, stride in axes:
        found = {address + i * stride for address in found for i in range(size)}
    return found


@rule("unfold")
def unfold(run: Interpreter, node: fx.Node, x: Value, dim: int, *_: Any) -> Value:
    """Windows of an axis, whose places stand on a new last axis."""
    moved = replaced(run, node, x, dim % len(x.axes), "a window slides over it")  # the result has one axis more
    return Value([*moved.axes, run.atoms.fresh(shape_of(node)[-1], FIXED, "a window's place")])


@rule("pixel_shuffle")
def pixel_shuffle(run: Interpreter, node: fx.Node, x: Value, factor: int) -> Value:
    """Channels of one place become neighbouring places: `[..., channels x places, height, width]`."""
    *lead, channels, height, width = x.axes
    kept = run.atoms.fresh(shape_of(node)[-3])
    run.atoms.tie(channels, kept + run.atoms.fresh(factor * factor, FIXED, "places"), "channels do not fit")
    for axis in (height, width):
        run.atoms.restrict(axis, FIXED, "it is resampled")
    run.parted([*lead, kept])
    return Value([*lead, kept, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[-2:])])


@rule("pixel_unshuffle")
def pixel_unshuffle(run: Interpreter, node: fx.Node, x: Value, factor: int) -> Value:
    """The inverse of `pixel_shuffle`."""
    *lead, channels, height, width = x.axes
    for axis in (height, width):
        run.atoms.restrict(axis, FIXED, "it is resampled")
    run.parted([*lead, channels])
    places = run.atoms.fresh(factor * factor, FIXED, "places")
    return Value([*lead, channels + places, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[-2:])])
