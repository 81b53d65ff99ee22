"""A convolution as a linear map: of the patches that its kernel sees, with the batch norm behind it multiplied in.

The norm is restored afterwards, with statistics that belong to the new weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.refit.regression import Moments


def folded(weight: Tensor, bias: Tensor | None, norm: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """A convolution's flat weight `[k, d]` and bias with the batch norm behind it multiplied in."""
    bias = torch.zeros(len(weight)) if bias is None else bias
    if norm is None:
        return weight, bias
    scale = norm["weight"] / (norm["variance"] + norm["eps"]).sqrt()
    return weight * scale[:, None], (bias - norm["mean"]) * scale + norm["bias"]


def restored(slope: Tensor, shift: Tensor, moments: Moments, eps: Tensor) -> dict[str, Tensor]:
    """The batch norm behind the weight `slope` that adds `shift`: its weight, bias, mean and variance, `[k]` each.

    `moments` are those of the patches, from which mean and variance of the convolution follow.
    """
    mean_x = moments.x / moments.n.clamp_min(1e-12)
    covariance = moments.xx / moments.n.clamp_min(1e-12) - torch.outer(mean_x, mean_x)
    mean = slope @ mean_x
    variance = ((slope @ covariance) * slope).sum(1).clamp_min(0)
    return {"weight": (variance + eps).sqrt(), "bias": shift + mean, "mean": mean, "variance": variance}


def patches(x: Tensor, weight: Tensor, node: fx.Node) -> Tensor:
    """What a convolution's kernel sees at every place of `[n, c, h, w]`: `[n * places, c * kernel]`."""
    given = dict(zip(("stride", "padding", "dilation"), node.args[3:6], strict=False))
    given |= {name: value for name, value in node.kwargs.items() if name in ("stride", "padding", "dilation")}
    geometry = {name: tuple(value) for name, value in given.items() if not isinstance(value, str)}
    if given.get("padding") == "same":
        x = functional.pad(x, same_padding(weight.shape[2:], geometry.get("dilation", (1, 1))))
    return functional.unfold(x, weight.shape[2:], **geometry).mT.flatten(0, 1)


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first, that keep the size; an odd one goes behind."""
    sides = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides
