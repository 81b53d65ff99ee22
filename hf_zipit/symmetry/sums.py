"""Axes that are direct sums: taken apart into the products that they are sums of, and put together again.

One projection to queries, keys and values has the axis heads x queries + heads x keys + heads x values (GPT-2), or
heads x (queries + keys + values) (GPT-NeoX). Whatever is done to an axis without sums is done to each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from hf_zipit.symmetry.spaces import AxisLabel, Sum, Trace, products

Kind = TypeVar("Kind", bound=Trace)

Length = Callable[[AxisLabel], int]
"""The number of units on an axis."""


def take_apart(x: Tensor, axis: int, label: AxisLabel, length: Length) -> list[Tensor]:
    """A tensor's parts along an axis, one for each of `products(label)`."""
    place = _first_sum(label)
    if place is None:
        return [x]
    before, terms, after = _around(label, place)
    spread = x.unflatten(axis, (length(before), -1, length(after)))
    parts = spread.split([length(term) for term in terms], axis + 1)
    return [
        part
        for term, y in zip(terms, parts, strict=True)
        for part in take_apart(y.flatten(axis, axis + 2), axis, before + term + after, length)
    ]


def put_together(parts: Sequence[Tensor], axis: int, label: AxisLabel, length: Length) -> Tensor:
    """The tensor of some parts along an axis; the inverse of `take_apart`."""
    return _joined(iter(parts), axis, label, length)


def _joined(parts: Iterator[Tensor], axis: int, label: AxisLabel, length: Length) -> Tensor:
    place = _first_sum(label)
    if place is None:
        return next(parts)
    before, terms, after = _around(label, place)
    done = [_joined(parts, axis, before + term + after, length) for term in terms]
    spread = [y.unflatten(axis, (length(before), -1, length(after))) for y in done]
    return torch.cat(spread, axis + 1).flatten(axis, axis + 2)


def by_products(
    x: Tensor,
    axes: Sequence[AxisLabel],
    function: Callable[[Tensor, tuple[AxisLabel, ...]], Tensor],
    length: Length,
    length_after: Length | None = None,
) -> Tensor:
    """A tensor after a function of tensors whose axes are no sums.

    Args:
        x: any tensor.
        axes: one label per axis.
        function: gets the parts of `x`, with their labels.
        length: how long an axis of `x` is.
        length_after: how long it is afterwards, if not as long.
    """
    axis = next((i for i, label in enumerate(axes) if _first_sum(label) is not None), None)
    if axis is None:
        return function(x, tuple(axes))
    done = [
        by_products(part, (*axes[:axis], label, *axes[axis + 1 :]), function, length, length_after)
        for part, label in zip(take_apart(x, axis, axes[axis], length), products(axes[axis]), strict=True)
    ]
    return put_together(done, axis, axes[axis], length_after or length)


def without_sums(spec: Kind, weights: Sequence[Mapping[str, Tensor]]) -> tuple[Kind, list[dict[str, Tensor]]]:
    """A spec and the weights of some models in which every part of a tensor is a tensor of its own.

    The parts are called after their tensor: `h.0.attn.c_attn.weight[2]`.
    """
    axes, taken = dict(spec.axes), [dict(own) for own in weights]
    for name, labels in spec.axes.items():
        summed = [i for i, label in enumerate(labels) if _first_sum(label) is not None]
        if summed:
            del axes[name]
            whole = [own.pop(name, None) for own in taken]
            _parts(name, labels, whole, axes, taken, spec.length)
    return replace(spec, axes=axes), taken


def _parts(
    name: str,
    labels: tuple[AxisLabel, ...],
    whole: Sequence[Tensor | None],
    axes: dict[str, tuple[AxisLabel, ...]],
    taken: Sequence[dict[str, Tensor]],
    length: Length,
) -> None:
    """Add the parts of a tensor to `axes` and `taken`."""
    axis = next((i for i, label in enumerate(labels) if _first_sum(label) is not None), None)
    if axis is None:
        axes[name] = labels
        for own, tensor in zip(taken, whole, strict=True):
            if tensor is not None:
                own[name] = tensor
        return
    apart = [None if tensor is None else take_apart(tensor, axis, labels[axis], length) for tensor in whole]
    for i, label in enumerate(products(labels[axis])):
        parts = [None if one is None else one[i] for one in apart]
        _parts(f"{name}[{i}]", (*labels[:axis], label, *labels[axis + 1 :]), parts, axes, taken, length)


def _first_sum(label: AxisLabel) -> int | None:
    return next((i for i, factor in enumerate(label) if isinstance(factor, Sum)), None)


def _around(label: AxisLabel, place: int) -> tuple[AxisLabel, tuple[AxisLabel, ...], AxisLabel]:
    """What stands before a sum, its terms, and what stands after it."""
    return label[:place], label[place].terms, label[place + 1 :]  # type: ignore[union-attr]
