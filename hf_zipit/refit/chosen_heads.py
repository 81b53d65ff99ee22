"""Attention heads in the refit that stay what they are: of all experts' those that explain most, as many as before.

Where something stands between the maps and the logits, as the rotation of a part of a head's units (GPT-NeoX), a head
is no matrix that could be merged with another. Nor can it be made narrower, unless that is a norm which narrower heads
can have, too (Qwen3). The mean of two experts' queries means little, though, even where their heads agree. So a layer
may have some of the experts' own heads instead, with queries, keys and values regressed on the merged model's input.
Under the weights that they give, every head's means are known, and the heads are chosen by forward selection in the
regression on what the stream lacks (orthogonal matching pursuit, as for the units of MLPs), those that share their
keys together.

Ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zipit.factorise import solve_positive
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.merged_attention import Block, MergedAttention
from hf_zipit.refit.mlp_solver import NOTHING, WORTH, centred, left_over
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import Gram


@dataclass(frozen=True)
class ExpertHeads:
    """All experts' heads as linear maps of the merged model's inputs, expert by expert.

    Attributes:
        blocks: by expert queries and keys, with a column for biases that matter.
        slope, shift: of the values, `[experts * groups, width, d]` and `[experts * groups, width]`.
        scales: by expert and name what stands between queries and keys and the logits and has a place for every head.
    """

    blocks: Sequence[Block]
    slope: Tensor
    shift: Tensor
    scales: Sequence[Mapping[str, Tensor]] = ()

    def of(self, chosen: Sequence[int]) -> Block:
        """Queries and keys of some groups of heads, in their order."""
        groups = len(self.slope) // len(self.blocks)
        return tuple(
            torch.cat([part.unflatten(0, (groups, -1)) for part in parts])[list(chosen)].flatten(0, 1)
            for parts in zip(*self.blocks, strict=True)
        )


@torch.no_grad()
def choose_heads(fit: Fit, forward: MergedAttention, heads: ExpertHeads, paired: float) -> list[int] | None:
    """The groups of heads to take, by their number among all experts'; None where paired heads are as good.

    Args:
        paired: the share of what the stream lacks that paired heads leave.
    """
    attention = forward.attention
    shared, site = attention.heads // attention.groups, attention.output
    slope, shift = (part.flatten(0, 1).to(fit.values.device, torch.float32) for part in (heads.slope, heads.shift))
    gram = Gram(len(slope) * shared, fit.outputs(site), device=fit.home)
    square = fit.zeros()
    for b in range(len(fit.values.batches)):
        values = forward.values(slope, shift, len(heads.slope), shared, b)
        means = forward.means(values, b, heads.blocks, heads.scales).transpose(1, 2).flatten(2)
        rows, picked = fit.rows.pick(means.shape, b, -1, means.shape[-1])
        y = fit.targets.of(site, b, rows)
        gram.add(at_rows(means, -1, rows), y, picked)
        square += picked.to(square) @ y.to(square).square().sum(1)
    moments, square = gram.reduce(fit.all_reduce), fit.all_reduce(square)
    xx, xy, lacking = centred(moments, square) if site.bias else (moments.xx, moments.xy, square)
    size = shared * attention.width
    xx.diagonal().add_(fit.config.ridge * xx.diagonal().mean().clamp_min(1e-12))
    chosen = best_groups(xx, xy, size, attention.groups)
    units = torch.cat([torch.arange(g * size, (g + 1) * size) for g in chosen]).to(xx.device)
    return chosen if left_over(xx, xy, lacking, units) <= WORTH * paired else None


def best_groups(gram: Tensor, cross: Tensor, size: int, count: int) -> list[int]:
    """The numbers, in order, of `count` groups of `size` inputs in a row that leave little of the targets: each step
    that which takes most of the rest.

    Args: as for `left_over`; `gram` is positive definite.
    """
    left, rest, chosen = gram.clone(), cross.clone(), list[int]()
    groups = len(gram) // size
    while len(chosen) < count:
        gains = []
        for g in range(groups):
            own = slice(g * size, (g + 1) * size)
            taken = g in chosen
            gains.append(-1.0 if taken else float((_solved(left[own, own], rest[own]) * rest[own]).sum()))
        best = max(range(groups), key=gains.__getitem__)
        own = slice(best * size, (best + 1) * size)
        share = _solved(left[own, own], torch.cat([left[own], rest[own]], 1))
        rest, left = rest - left[:, own] @ share[:, len(left) :], left - left[:, own] @ share[:, : len(left)]
        chosen.append(best)
    return sorted(chosen)


def _solved(left: Tensor, right: Tensor) -> Tensor:
    return solve_positive(left, right, NOTHING * left.diagonal().max().clamp_min(1e-24))
