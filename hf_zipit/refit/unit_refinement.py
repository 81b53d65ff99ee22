"""MLPs in the refit: what units put out is fitted to what the stream lacks, through their nonlinearity.

Units that were chosen, or paired, have weights that were solved one by one, as if what a unit puts out were a linear
function of them. Together with the output projection they are the solution of a small nonlinear least squares problem,

    min  sum_i w_i || V f(W x_i + b) + c - y_i ||^2

with x what the merged model feeds into the layer and y what the stream lacks, both known. Steps of Adam on some rows
at a time (`steps.py`) in coordinates in which x and f are white solve most of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_zipit.refit.fit import Fit
from hf_zipit.refit.mlps import Mlp
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import SecondMoments, ridge
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.steps import (
    HELD_OUT,
    Spread,
    WhiteLayer,
    is_held_out,
    take_steps,
    typical_size,
    whitening,
    whitening_of,
)
from hf_zipit.refit.values import MERGED

ROOM = 2**25
"""So many numbers may the inputs and targets of the rows be that units are fitted on."""

AT_ONCE = 1024
"""Rows that a step sees, about."""

PASSES = 2
"""So often, at most, steps go through all rows,"""

FEW = 64
"""if that is more steps than this."""

EVERY = 32
"""After so many steps the samples that are held out are looked at."""

RIGHT = 0.02
"""Nothing is fitted where what is left is no more than this share of the stream's own variance."""

CHUNK = 8192
"""Rows that go through the layer at once where there are no gradients."""

LayerWeights = Mapping[RefitSite, Sequence[Tensor]]
"""Of every linear map of an MLP: `[outputs, inputs]`, and a bias `[outputs]` where it has one."""


@dataclass(frozen=True)
class MlpRows:
    """Inputs `[rows, d]` of a layer, what it should put out `[rows, k]`, what the stream lacks (the same tensor, or
    what the norm behind the layer should make of it), the rows' weights, and which of them belong together.

    `turn` counts the rows of all samples through, position after position: rows with the same remainder are spread
    over the samples.
    """

    x: Tensor
    target: Tensor
    lacking: Tensor
    weight: Tensor
    turn: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Inputs, targets, what is lacking and weights of not too many rows."""
        return zip(*(part.split(CHUNK) for part in (self.x, self.target, self.lacking, self.weight)), strict=True)


def refine_units(fit: Fit, mlp: Mlp) -> bool:
    """Write better weights of an MLP's units, and of its output projection, into the merged model.

    Returns:
        Whether there are any.
    """
    fitted, held, spread = split_rows(fit, mlp)
    with torch.no_grad():
        layer = WhiteMlp(fit, mlp, fitted, solve_reader(fit, mlp, fitted))
        errors = UnitErrors(fit, fitted, held)
        first = errors.held_out(layer)
    steps = min(fit.config.unit_steps, max(FEW, PASSES * errors.windows))
    right = RIGHT * spread / errors.lacking
    found = take_steps(fit, layer, errors, first=first, steps=steps, every=EVERY, right=right)
    for site, own in (found[0] if found else {}).items():
        fit.write(site, *own)
    return found is not None


class WhiteMlp(WhiteLayer[LayerWeights]):
    """An MLP as a function of its input, with parameters in which its inputs and its units' outputs are white."""

    def __init__(self, fit: Fit, mlp: Mlp, rows: MlpRows, put_out: SecondMoments) -> None:
        """`put_out`: what the units put out on the rows."""
        self.fit, self.mlp = fit, mlp
        own = {site: layer_weights(fit, site) for site in (*mlp.writers, mlp.reader)}
        white = whitening(fit, ((x, weight) for x, *_, weight in rows.chunks()))
        even = whitening_of(fit, put_out.xx / put_out.n.clamp_min(1e-12), rows.x)
        self.white = {site: even[0] if site is mlp.reader else white[0] for site in own}
        undo = {site: even[1] if site is mlp.reader else white[1] for site in own}
        self.own = {site: [weight @ undo[site], *bias] for site, (weight, *bias) in own.items()}
        typical = [typical_size(parts[0]) for parts in self.own.values() for _ in parts]
        self.set_parameters([part for parts in self.own.values() for part in parts], typical)

    def __call__(self, x: Tensor) -> Tensor:
        own = self._now()
        put_out = functional.linear(units(self.fit, self.mlp, x, own), *own[self.mlp.reader])
        return self.fit.into_stream(self.mlp.reader, put_out)

    def _now(self) -> LayerWeights:
        return {site: [weight @ self.white[site], *bias] for site, (weight, *bias) in self.own.items()}

    @torch.no_grad()
    def weights(self) -> LayerWeights:
        return {site: [part.clone() for part in parts] for site, parts in self._now().items()}


class UnitErrors:
    """How far an MLP is from what the stream lacks, as a share of that."""

    def __init__(self, fit: Fit, fitted: MlpRows, held: MlpRows) -> None:
        self.fit, self.fitted, self.held = fit, fitted, held
        self.windows = max(1, round(float(fit.all_reduce(fitted.weight.new_tensor(len(fitted.x)))) / AT_ONCE))
        turns = fitted.turn % self.windows
        self.rows = turns.argsort(stable=True).split(turns.bincount(minlength=self.windows).tolist())
        self.whole, self.lacking = (
            max(float(fit.all_reduce(rows.weight @ rows.lacking.square().sum(1))), 1e-30) for rows in (fitted, held)
        )

    def held_out(self, layer: WhiteMlp) -> Tensor:
        total = self.fit.zeros(1)
        with torch.no_grad():
            for x, _, y, weight in self.held.chunks():
                total += (weight @ (layer(x) - y).square().sum(1)).to(total)
        return self.fit.all_reduce(total) / self.lacking

    def backward(self, layer: WhiteMlp, step: int) -> None:
        rows = self.rows[step % self.windows]
        x, y, weight = (part[rows] for part in (self.fitted.x, self.fitted.lacking, self.fitted.weight))
        (weight @ (layer(x) - y).square().sum(1) * (self.windows / self.whole)).backward()


def layer_weights(fit: Fit, site: RefitSite) -> list[Tensor]:
    """A linear map's weight `[outputs, inputs]` and, if it has one, its bias as they are in the merged model."""
    return [part for part in fit.affine(site) if part is not None]


def units(fit: Fit, mlp: Mlp, x: Tensor, own: LayerWeights, b: int = 0) -> Tensor:
    """What an MLP's units put out with weights of one's own, on rows of a batch: all ops between go unit by unit."""
    known = {site.node: functional.linear(x, *own[site]) for site in mlp.writers}
    return fit.values.follow(mlp.between, known, MERGED, b)[mlp.reader.node.args[0]]  # type: ignore[index]


def solve_reader(fit: Fit, mlp: Mlp, rows: MlpRows) -> SecondMoments:
    """Write the output projection that suits the units as they are; the moments of what these put out."""
    start = fit.matrix(mlp.reader)
    own = {site: layer_weights(fit, site) for site in mlp.writers}
    gram = fit.gram(start)
    for x, y, _, weight in rows.chunks():
        gram.add(units(fit, mlp, x, own), y, weight)
    moments = gram.reduce(fit.all_reduce)
    fit.write(mlp.reader, *ridge(moments, start, fit.config.ridge, mlp.reader.bias is not None))
    return moments


def split_rows(fit: Fit, mlp: Mlp) -> tuple[MlpRows, MlpRows, float]:
    """The rows that are fitted, those of samples that are held out, and how far the stream of these varies."""
    outputs, aim, normed = fit.outputs(mlp.reader), mlp.reader.aim, mlp.reader.behind is not None
    parts: tuple[list[list[Tensor]], ...] = ([], [])
    spread = Spread(fit, outputs)
    for b, batch in enumerate(fit.values.batches):
        x = fit.values.of(mlp.input, MERGED, b)
        rows, picked = fit.rows.pick(x.shape, b, -1, ROOM // (x.shape[-1] + outputs * (1 + normed)), 1)
        target, stream = fit.targets.of(mlp.reader, b, rows), fit.targets.reached(aim, b, rows)
        weight = picked.to(x)
        count = x.shape[:-1].numel()
        number = torch.arange(count, device=x.device)[rows]
        sample, position = batch.first + number * batch.size // count, number % max(count // batch.size, 1)
        held = is_held_out(sample)
        own = [at_rows(x, -1, rows), target, weight, sample - sample // HELD_OUT + position]
        own += [fit.targets.of(aim, b, rows)] if normed else []
        parts[0].append([part[~held] for part in own])
        parts[1].append([part[held] for part in own])
        spread.add(stream[held], weight[held])
    fit.targets.forget(mlp.reader)
    fitted, held = (_joined(list(map(torch.cat, zip(*found, strict=True)))) for found in parts)
    return fitted, held, spread.total()


def _joined(parts: Sequence[Tensor]) -> MlpRows:
    x, target, weight, turn, *lacking = parts
    return MlpRows(x, target, lacking[0] if lacking else target, weight, turn)
