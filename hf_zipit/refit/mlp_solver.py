"""MLPs in the refit: of all experts' units those are chosen that explain best what the residual stream lacks.

Two units of different initialisations rarely compute the same, and the mean of two pre-activations, put through a
nonlinearity or multiplied by the mean of two others, is neither. So every unit of an expert may stay a unit of its
own, where another has to go. The candidates are

- each pair of the alignment, from the mean of its experts' weights,
- each expert's units on their own,

with weights that are regressed on the merged model's input. What they put out on it is known, so the units are chosen
by forward selection in the regression on what the output projection aims at (orthogonal matching pursuit, Pati et al.
1993, with a pivoted Cholesky factorisation). A layer whose pairs explain nearly as much keeps them.

Ours; PLeaS (arXiv 2407.02447) keeps units apart at the price of width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zipit.factorise import solve_positive
from hf_zipit.maps.transform import features_to_merged
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.mlps import Mlp
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import Gram, SecondMoments
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.solvers import regress_inputs, solve, written
from hf_zipit.refit.unit_refinement import refine_units, units
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.spec import products

AGREED = 1e-3
"""Pairs that leave no more than this fraction of what the stream lacks are kept,"""

WORTH = 0.97
"""and so are those that the choice does not bring below this multiple of what they leave."""

ROWS = 2
"""About this many rows per candidate enter the choice; it needs fewer than weights do."""

AT_ONCE = 2048
"""So many rows are run through all candidates at once."""

STEPS = 256
"""Units are chosen in about so many steps, several at a time where there are more units."""


NOTHING = 1e-6
"""What is left of a unit's square, as a fraction of it, is rounding."""


@dataclass(frozen=True)
class Candidates:
    """Units that a merged layer may have.

    Attributes:
        maps: by writer the candidates' weights `[pieces, candidates, inputs]` and biases `[pieces, candidates]`,
            float64; a fused map has several pieces, a gate and what it gates.
        columns: what the output projection starts from, `[outputs, candidates]`.
        pairs: how many of them, the first ones, are the alignment's.
    """

    maps: dict[RefitSite, tuple[Tensor, Tensor]]
    columns: Tensor
    pairs: int


@torch.no_grad()
def choose_units(fit: Fit, mlp: Mlp) -> bool:
    """Write the units' weights and the start of the output projection into the merged model.

    Returns:
        Whether the units are others than the alignment's: they were chosen, or refined (`unit_refinement.py`).
    """
    candidates = _candidates(fit, mlp)
    moments, square = _moments(fit, mlp, candidates)
    gram, cross, lacking = centred(moments, square) if mlp.reader.bias else (moments.xx, moments.xy, square)
    pairs = torch.arange(candidates.pairs, device=gram.device)
    own = off(gram, cross, lacking, candidates.columns[:, : candidates.pairs].to(gram))
    penalty = fit.config.ridge * gram.diagonal()[: candidates.pairs].mean().clamp_min(1e-12)
    gram.diagonal().add_(penalty)
    left = left_over(gram, cross, lacking, pairs)
    agreed = min(own, left) <= AGREED  # the ridge of few samples hides it
    chosen = pairs if agreed else best_units(gram, cross, candidates.pairs).sort().values
    keep = torch.equal(chosen, pairs) or left_over(gram, cross, lacking, chosen) > WORTH * left
    if keep:
        for site in mlp.writers:
            solve(fit, site)
    else:
        for site, (weight, bias) in candidates.maps.items():
            fit.write(site, weight[:, chosen].flatten(0, 1), bias[:, chosen].flatten())
        fit.write(mlp.reader, candidates.columns[:, chosen])
    refined = not agreed and fit.config.unit_steps > 0 and refine_units(fit, mlp)
    fit.values.run_again([site.node for site in mlp.writers], mlp.at)
    return refined or not keep


def _candidates(fit: Fit, mlp: Mlp) -> Candidates:
    spec, experts = fit.spec, fit.values.experts
    units = fit.input_label(mlp.writers[0])
    _, inputs = regress_inputs(fit, [mlp.input], units, all(site.bias for site in mlp.writers))
    maps = {}
    for site in mlp.writers:
        label, *others = products(fit.targets.label(site))
        pieces = (1 + len(others), -1)
        own = [[part.unflatten(0, pieces) for part in written(fit, site, t, *inputs[t])] for t in experts]
        merged = [[features_to_merged(part, 1, label, fit.alignment, spec, t) for part in own[t]] for t in experts]
        pairs = [torch.stack(parts).mean(0) for parts in zip(*merged, strict=True)]
        weight, bias = (
            torch.cat([pair, *parts], 1) for pair, parts in zip(pairs, zip(*own, strict=True), strict=True)
        )
        maps[site] = weight, bias if site.bias else torch.zeros_like(bias)
    label = fit.targets.label(mlp.reader)
    columns = [fit.matrix(mlp.reader)]
    for t in experts:
        own = features_to_merged(fit.matrix(mlp.reader, t), 0, label, fit.alignment, spec, t)
        columns.append(own / len(experts))
    return Candidates(maps, torch.cat(columns, 1), columns[0].shape[1])


def _moments(fit: Fit, mlp: Mlp, candidates: Candidates) -> tuple[SecondMoments, Tensor]:
    """Moments of the candidates' activations and of what the projection aims at, and the latter's mean square sum."""
    outputs, count = candidates.columns.shape
    gram, square = Gram(count, outputs, device=fit.home), fit.zeros()
    for b in range(len(fit.values.batches)):
        x = fit.values.of(mlp.input, MERGED, b)
        rows, picked = fit.rows.pick(x.shape, b, -1, count, ROWS)
        y = fit.targets.of(mlp.reader, b, rows)
        parts = (part.split(AT_ONCE) for part in (at_rows(x, -1, rows), y, picked))
        for inputs, target, weight in zip(*parts, strict=True):  # the candidates' activations are many times a layer's
            gram.add(_activations(fit, mlp, candidates, inputs, b), target, weight)
        square += picked.to(square) @ y.to(square).square().sum(1)
    fit.targets.forget(mlp.reader)
    return gram.reduce(fit.all_reduce), fit.all_reduce(square)


def _activations(fit: Fit, mlp: Mlp, candidates: Candidates, x: Tensor, b: int) -> Tensor:
    """What candidates put out on rows of the merged model's input."""
    maps = candidates.maps.items()
    own = {site: (weight.flatten(0, 1).to(x), bias.flatten().to(x)) for site, (weight, bias) in maps}
    return units(fit, mlp, x, own, b)


def centred(moments: SecondMoments, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments about the means, for a regression with an intercept; with the memory of the given ones."""
    mean_x, mean_y = moments.x / moments.n, moments.y / moments.n
    return (
        moments.xx.addr_(moments.x, mean_x, alpha=-1),
        moments.xy.addr_(moments.x, mean_y, alpha=-1),
        square - moments.y @ mean_y,
    )


def left_over(gram: Tensor, cross: Tensor, square: Tensor, chosen: Tensor) -> float:
    """The fraction of the targets' square sum that a regression on the chosen inputs leaves.

    Args:
        gram: `[n, n]` of the inputs, with its penalty; cross: `[n, k]`, their products with the targets.
        square: the targets' square sum.
        chosen: numbers of the inputs.
    """
    left, right = gram[chosen[:, None], chosen], cross[chosen]
    explained = (solve_positive(left, right, NOTHING * left.diagonal().max().clamp_min(1e-24)) * right).sum()
    return float(1 - explained / square.clamp_min(1e-30))


def off(gram: Tensor, cross: Tensor, square: Tensor, slope: Tensor) -> float:
    """The fraction of the targets' square sum that a slope `[k, m]` on the first m inputs leaves, without a penalty.

    Args: as for `left_over`.
    """
    count = slope.shape[1]
    left = square + ((slope @ gram[:count, :count] - 2 * cross[:count].T) * slope).sum()
    return float(left / square.clamp_min(1e-30))


def best_units(gram: Tensor, cross: Tensor, count: int) -> Tensor:
    """The numbers of `count` inputs that leave little of the targets, each step those that take most of the rest.

    Args: as for `left_over`. Of inputs that say the same only the first to be chosen takes anything.
    """
    if gram.device.type != "cpu":  # to look at every step's inputs takes longer than the step
        chosen, independent = _best_units(gram, cross, count, look=False)
        if bool(independent):
            return chosen
    return _best_units(gram, cross, count, look=True)[0]


def _best_units(gram: Tensor, cross: Tensor, count: int, look: bool) -> tuple[Tensor, Tensor]:
    """The units, and whether none of a step's repeats another; where some do they are right only with `look`."""
    at_once = -(-count // STEPS)
    spread, rest = gram.diagonal().clone(), cross.clone()
    whole = spread.clone()
    factor = gram.new_zeros(count, len(gram))  # a step reads all of it and of `rest`, and takes as long as that does
    chosen, independent = torch.empty(0, dtype=torch.long, device=gram.device), gram.new_ones((), dtype=torch.bool)
    while len(chosen) < count:
        done = len(chosen)
        gain = torch.linalg.vector_norm(rest, dim=1).square_() / spread.clamp_min(1e-30)
        gain[spread <= NOTHING * whole] = 0.0
        gain[chosen] = -1.0
        units = gain.topk(min(at_once, count - done)).indices
        rows = torch.addmm(gram[units], factor[:done, units].mT, factor[:done], alpha=-1)
        if look:
            inner = independent_factor(rows[:, units].cpu(), whole[units].cpu()).to(gram)
        else:
            inner, alone = quick_factor(rows[:, units], whole[units])
            independent &= alone
        rows = inner.mT @ rows
        factor[done : done + len(units)] = rows
        rest.addmm_(rows.mT, inner.mT @ rest[units], alpha=-1)
        spread = (spread - rows.square().sum(0)).clamp_min(0)
        chosen = torch.cat([chosen, units])
    return chosen, independent


def quick_factor(inner: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What `independent_factor` gives where no unit repeats another, and whether that is so, bool `[]`."""
    factor, failed = torch.linalg.cholesky_ex(inner)
    eye = torch.eye(len(inner), out=torch.empty_like(inner))
    root = torch.linalg.solve_triangular(factor, eye, upper=False).mT
    return root, (failed == 0) & (factor.diagonal().square() > NOTHING * whole).all()


def independent_factor(inner: Tensor, whole: Tensor) -> Tensor:
    """R `[n, n]`, upper triangular, with R^T G R = 1 for a Gram matrix G `[n, n]`; zeros for units that repeat others.

    `whole` are the units' squares before anything was taken from them.
    """
    root, alone = quick_factor(inner, whole)
    if bool(alone):
        return root
    count = len(inner)
    left, root = inner.clone(), torch.eye(count, dtype=inner.dtype)
    for i in range(count):
        if left[i, i] <= NOTHING * whole[i]:  # its twin was chosen in the same step
            root[:, i] = 0.0
            continue
        root[:, i] /= left[i, i].sqrt()
        share = left[i, i + 1 :] / left[i, i].sqrt()
        root[:, i + 1 :] -= torch.outer(root[:, i], share)
        left[i + 1 :, i + 1 :] -= torch.outer(share, share)
    return root
