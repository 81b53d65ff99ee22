"""A convolution as a linear map: of the patches that its kernel sees, with the batch norm behind it multiplied in.

The norm is restored afterwards, with statistics that belong to the new weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.refit.positions import Picked, places
from hf_zipit.refit.regression import SecondMoments
from hf_zipit.refit.solvable import setting
from hf_zipit.symmetry.ops import shape_of


def folded(weight: Tensor, bias: Tensor | None, norm: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
    """A convolution's flat weight `[k, d]` and bias with the batch norm behind it multiplied in."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if norm is None:
        return weight, bias
    scale = norm["weight"] / (norm["variance"] + norm["eps"]).sqrt()
    return weight * scale[:, None], (bias - norm["mean"]) * scale + norm["bias"]


def restored(slope: Tensor, shift: Tensor, moments: SecondMoments, eps: float) -> dict[str, Tensor]:
    """The batch norm behind the weight `slope` that adds `shift`: its weight, bias, mean and variance, `[k]` each.

    `moments` are those of the patches, from which mean and variance of the convolution follow.
    """
    mean_x = moments.x / moments.n.clamp_min(1e-12)
    covariance = torch.addr(moments.xx, moments.x, mean_x, alpha=-1)
    mean = slope @ mean_x
    variance = ((slope @ covariance) * slope).sum(1).clamp_min(0) / moments.n.clamp_min(1e-12)
    return {"weight": (variance + eps).sqrt(), "bias": shift + mean, "mean": mean, "variance": variance}


def patches(x: Tensor, weight: Tensor, node: fx.Node, rows: Picked) -> Tensor:
    """What a convolution's kernel sees at some places of `[n, c, ...]`: `[rows, c * kernel]`.

    `rows` are numbers among all its places, `n * height * width` of the output. Of a convolution with groups all
    channels are taken, each group's after the other.
    """
    kernel = weight.shape[2:]
    stride, dilation = (
        _each(setting(node, place, name, 1), kernel) for place, name in ((3, "stride"), (5, "dilation"))
    )
    seen = functional.pad(x, _padding(setting(node, 4, "padding", 0), kernel, dilation)).movedim(1, -1)
    sizes = seen.shape[1:-1]
    corner, *lines = places((len(x), *shape_of(node)[2:]), rows, x.device)
    offsets = torch.zeros(1, dtype=torch.long, device=x.device)
    for size, line, step, length, gap in zip(sizes, lines, stride, kernel, dilation, strict=True):
        corner = corner * size + line * step
        offsets = (offsets[:, None] * size + torch.arange(length, device=x.device) * gap).flatten()
    return seen.flatten(0, -2)[corner[:, None] + offsets].mT.flatten(1)


def _each(value: Any, kernel: Sequence[int]) -> list[int]:
    """A setting of all axes, or of each."""
    values = [value] if isinstance(value, int) else list(value)
    return values if len(values) == len(kernel) else values * len(kernel)


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first."""
    if isinstance(value, str):
        return same_padding(kernel, dilation) if value == "same" else [0] * 2 * len(kernel)
    return [side for sides in reversed(_each(value, kernel)) for side in (sides, sides)]


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first, that keep the size; an odd one goes behind."""
    sides = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides
