"""FeatCal: after any merge, layers are calibrated one by one, in the order they run, on features (arXiv 2605.13030).

With x_s the inputs of a layer in the model that is merged so far, x_e those in expert t, on task t's data, and
x_m = a x_e + (1 - a) x_s the blended ones:

    C_t = E[x_s x_s^T],  K_t = E[x_m x_s^T],  both divided by s_t^-1 = |C_t|_F,
    W = (sum_t W_t K_t + l A) (sum_t C_t + l I)^-1,  A = r W_merged + (1 - r) W_0,
    b = (sum_t s_t (b_t + W_t E[x_m] - W E[x_s]) + l A_b) / (sum_t s_t + l).

The anchor A lies beyond the merged weights for r > 1. A norm's scale and shift are solved unit by unit, all tasks
counting the same: the scale with the shift free, then the shift as above. Other tensors are the first merge's. (The
published code lets tokens other than the class token count little in the last block; here all rows are alike.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zipit.combine.after import inner, surveyed
from hf_zipit.combine.layers import Layer
from hf_zipit.combine.matrices import view_of
from hf_zipit.combine.options import above, share_of
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("featcal", survey=surveyed("featcal"))
def featcal(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    generator: torch.Generator,
    whole: Any = None,
    layer: Layer | None = None,
    after: str = "task-arithmetic",
    options: Mapping[str, Any] | None = None,
    blend: float = 0.3,
    reach: float = 2.0,
    ridge: float = 0.05,
) -> Tensor:
    """Another rule's tensor, calibrated.

    Args:
        after: the rule that merges first.
        options: its options.
        blend: a, from 0 (the merged model's inputs only) to 1.
        reach: r.
        ridge: l.

    Raises:
        RecipeError: as the other rule does, or an option out of range.
    """
    share_of("featcal", "blend", blend, zero=True)
    above("featcal", "reach", reach)
    above("featcal", "ridge", ridge)
    rule, known = inner("featcal", after, options)
    merged = rule.combine(tensors, labels, plan, known, base=base, whole=whole, generator=generator)
    if layer is None:
        return merged
    anchor = base + reach * (merged - base)
    cross = [blend * k.mT + (1 - blend) * c if k.dim() == 2 else blend * k + (1 - blend) * c
             for k, c in zip(layer.cross, layer.merged, strict=True)]  # fmt: skip
    mean = [blend * e + (1 - blend) * s for e, s in zip(layer.expert_mean, layer.merged_mean, strict=True)]
    if layer.solved is not None:
        return bias(layer, tensors, mean, anchor, ridge)
    if layer.is_norm:
        return scale(layer, cross, mean, anchor, ridge)
    sizes = shares(layer)
    left = sum(s * c for s, c in zip(sizes, layer.merged, strict=True))
    right = sum(s * w @ k for s, w, k in zip(sizes, layer.weights, cross, strict=True))
    view = view_of(base, labels)
    assert view is not None
    left = left + ridge * torch.eye(len(left), dtype=left.dtype)
    return view.tensor(torch.linalg.solve(left, right + ridge * view.matrix(anchor), left=False), base)


def shares(layer: Layer) -> list[float]:
    """s_t; all one for a norm."""
    return [1.0 if layer.is_norm else 1 / max(float(c.norm()), 1e-300) for c in layer.merged]


def scale(layer: Layer, cross: Sequence[Tensor], mean: Sequence[Tensor], anchor: Tensor, ridge: float) -> Tensor:
    """A norm's scale: of the two normal equations of every unit, the one that is left without the shift."""
    count = len(layer.weights)
    shifts = layer.biases or [torch.zeros_like(anchor)] * count
    seen = sum(layer.merged_mean) * (1.0 if layer.biases else 0.0)  # without a shift nothing is centred
    reached = sum(b + w * m for b, w, m in zip(shifts, layer.weights, mean, strict=True))
    right = sum(w * k + s * b
                for w, k, s, b in zip(layer.weights, cross, layer.merged_mean, shifts, strict=True))  # fmt: skip
    return (right - seen * reached / count + ridge * anchor) / (sum(layer.merged) - seen.square() / count + ridge)


def bias(layer: Layer, biases: Sequence[Tensor], mean: Sequence[Tensor], anchor: Tensor, ridge: float) -> Tensor:
    """What is left, on average, once the matrix or scale is there."""
    assert layer.solved is not None
    sizes, solved = shares(layer), layer.solved
    apply = torch.mul if layer.is_norm else torch.mv
    lacking = [
        b + apply(w, m) - apply(solved, s)
        for b, w, m, s in zip(biases, layer.weights, mean, layer.merged_mean, strict=True)
    ]
    total = sum(size * lack for size, lack in zip(sizes, lacking, strict=True))
    return (total + ridge * anchor) / (sum(sizes) + ridge)
