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
    """What a convolution's kernel sees at some places of `[n, c, h, w]`: `[rows, c * kernel]`.

    `rows` are numbers among all its places, `n * height * width` of the output.
    """
    given = dict(zip(("stride", "padding", "dilation"), node.args[3:6], strict=False))
    given |= {name: value for name, value in node.kwargs.items() if name in ("stride", "padding", "dilation")}
    (down, right), (step_down, step_right) = (_both(given.get(name, 1)) for name in ("stride", "dilation"))
    kernel = weight.shape[2:]
    seen = functional.pad(x, _padding(given.get("padding", 0), kernel, (step_down, step_right))).movedim(1, -1)
    height, width = seen.shape[1:3]
    sample, line, column = places((len(x), *shape_of(node)[2:]), rows, x.device)
    corner = (sample * height + line * down) * width + column * right
    lines, columns = (torch.arange(size, device=x.device) for size in kernel)
    lines, columns = lines * step_down * width, columns * step_right
    offsets = (lines[:, None] + columns).flatten()
    return seen.flatten(0, 2)[corner[:, None] + offsets].mT.flatten(1)


def _both(setting: Any) -> tuple[int, int]:
    """A setting of both axes, or of each."""
    values = [setting] if isinstance(setting, int) else list(setting)
    return values[0], values[-1]


def _padding(setting: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first."""
    if isinstance(setting, str):
        return same_padding(kernel, dilation) if setting == "same" else [0] * 4
    lines, columns = _both(setting)
    return [columns, columns, lines, lines]


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first, that keep the size; an odd one goes behind."""
    sides = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides
