"""MLPs in the refit: what units put out is fitted to what the stream lacks, through their nonlinearity.

Units that were chosen, or paired, have weights that were solved one by one, as if what a unit puts out were a linear
function of them. Together with the output projection they are the solution of a small nonlinear least squares problem,

    min  sum_i w_i || V f(W x_i + b) + c - y_i ||^2  (+ a ridge towards the weights so far)

with x what the merged model feeds into the layer and y what the stream lacks, both known. A few steps of L-BFGS (Liu
and Nocedal 1989) in coordinates in which x and f are white solve most of it. Some of the samples are held out: the
steps stop where they no longer help there, and the best weights on them are kept, which may be the first ones.

No model is run or differentiated but the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.factorise import square_root
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.mlps import Mlp
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import ridge
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.values import MERGED

EQUATIONS = 16
"""About so many numbers are fitted for every weight,"""

ENOUGH = 16384
"""on at most about so many rows: a wide layer's weights are regressed already, and its steps are dear;"""

HELD_OUT = 8
"""one sample in so many is held out; of fewer than that none is, and nothing is fitted."""

AT_ONCE = 5
"""After so many steps the samples that are held out are looked at,"""

WORTH = 0.97
"""and no more are made where these did not bring their error below this multiple,"""

RIGHT = 0.02
"""or to this share of the stream's own variance."""

CHUNK = 8192
"""Rows that go through the layer at once."""


@dataclass(frozen=True)
class FittedRows:
    """Inputs `[rows, d]` of a layer, its targets `[rows, k]`, the stream that these lead to, and the rows' weights."""

    x: Tensor
    y: Tensor
    stream: Tensor
    weight: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, targets and weights of not too many rows."""
        return zip(*(part.split(CHUNK) for part in (self.x, self.y, self.weight)), strict=True)


@torch.enable_grad()
def refine_units(fit: Fit, mlp: Mlp) -> bool:
    """Write better weights of an MLP's units, and of its output projection, into the merged model.

    Returns:
        Whether there are any.
    """
    fitted, held = split_rows(fit, mlp)
    with torch.no_grad():
        solve_reader(fit, mlp, fitted)
    layer = WhiteMlp(fit, mlp, fitted)

    def error(rows: FittedRows, grad: bool = False) -> Tensor:
        """Of all processes; gradients, where they are wanted, are of this one's rows."""
        total = rows.x.new_zeros(())
        for x, y, weight in rows.chunks():
            with torch.set_grad_enabled(grad):
                part = weight @ (layer(x) - y).square().sum(1) / whole
            if grad:
                part.backward()
            total += part.detach()
        return fit.all_reduce(total)

    def closure() -> Tensor:
        layer.clear()
        total = error(fitted, grad=True)
        for parameter in layer.parameters:
            parameter.grad = fit.all_reduce(parameter.grad)
        penalty = layer.penalty() / whole  # of all processes, once
        penalty.backward()
        return total + penalty.detach()

    whole = 1.0
    whole = float(error(fitted).clamp_min(1e-30))
    right = RIGHT * spread(fit, held) / whole
    optimizer = torch.optim.LBFGS(
        layer.parameters, max_iter=AT_ONCE, history_size=5, line_search_fn="strong_wolfe", tolerance_change=0.0
    )
    best, found, steps = float(error(held)), None, 0
    while steps < fit.config.unit_steps and best > right:
        optimizer.step(closure)
        steps, before, now = steps + AT_ONCE, best, float(error(held))
        if now < best:  # it is a number, too
            best, found = now, layer.weights()
        if not now < WORTH * before:
            break
    for site, (weight, bias) in (found or {}).items():
        fit.write(site, weight, bias)
    return found is not None


class WhiteMlp:
    """An MLP as a function of its input, with parameters in which its inputs and its units' outputs are white."""

    def __init__(self, fit: Fit, mlp: Mlp, rows: FittedRows) -> None:
        self.fit, self.mlp = fit, mlp
        self.sites = (*mlp.writers, mlp.reader)
        own = {site: layer_weights(fit, site) for site in self.sites}
        with torch.no_grad():
            white, back, energy = whitening(fit, rows.x, rows.weight)
            even, narrow, strength = whitening(fit, units(fit, mlp, rows.x, own), rows.weight)
            energy = energy * float(own[mlp.reader][0].square().sum(0).mean())  # as if units put out what they are fed
        self.ridge = {site: strength if site is mlp.reader else energy for site in self.sites}
        self.start = {site: own[site][0] for site in self.sites}
        self.white = {site: even if site is mlp.reader else white for site in self.sites}
        undo = {site: narrow if site is mlp.reader else back for site in self.sites}
        self.own = {site: [own[site][0] @ undo[site], *own[site][1:]] for site in self.sites}
        self.parameters = [part.requires_grad_() for parts in self.own.values() for part in parts]

    def __call__(self, x: Tensor) -> Tensor:
        own = {site: [parts[0] @ self.white[site], *parts[1:]] for site, parts in self.own.items()}
        return functional.linear(units(self.fit, self.mlp, x, own), *own[self.mlp.reader])

    def clear(self) -> None:
        """Forget the gradients; rows may be none, of which there are none."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def penalty(self) -> Tensor:
        """The ridge of the weights, towards those that they started from."""
        off = {site: parts[0] @ self.white[site] - self.start[site] for site, parts in self.own.items()}
        return torch.stack([self.ridge[site] * part.square().sum() for site, part in off.items()]).sum()

    def weights(self) -> dict[RefitSite, tuple[Tensor, Tensor | None]]:
        """The layer's weights and biases as they are now."""
        return {
            site: ((parts[0] @ self.white[site]).detach(), parts[1].detach().clone() if len(parts) > 1 else None)
            for site, parts in self.own.items()
        }


def layer_weights(fit: Fit, site: RefitSite) -> list[Tensor]:
    """A linear map's weight `[outputs, inputs]` and, if it has one, its bias as they are in the merged model."""
    weight = fit.matrix(site).float().clone()
    return [weight] if site.bias is None else [weight, fit.values.merged[site.bias].float().clone()]


def units(fit: Fit, mlp: Mlp, x: Tensor, own: Mapping[RefitSite, Sequence[Tensor]], b: int = 0) -> Tensor:
    """What an MLP's units put out with weights of one's own, on rows of a batch: all ops between go unit by unit."""
    values = fit.values
    known: dict[fx.Node, Tensor] = {site.node: functional.linear(x, *own[site]) for site in mlp.writers}
    for node in mlp.between:
        known[node] = values.program.run(
            node,
            lambda used: known[used] if used in known else values.of(used, MERGED, b),
            values.merged,
            values.inputs[b],
            merged=True,
        )
    return known[mlp.reader.node.args[0]]  # type: ignore[index]


def whitening(fit: Fit, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """C `[d, d]` for which C x is white, as far as the ridge allows; its inverse; and the ridge."""
    moments = fit.all_reduce((x * weight[:, None]).T @ x).to(fit.home, torch.float64)
    strength = fit.config.ridge * float(moments.diagonal().mean().clamp_min(1e-30))
    moments.diagonal().add_(strength)
    root, inverse = square_root(moments, moments.diagonal().mean() * 1e-12)
    scale = float(moments.diagonal().mean().sqrt())  # of rows, not of their sum
    return (inverse * scale).to(x), (root / scale).to(x), strength


def solve_reader(fit: Fit, mlp: Mlp, rows: FittedRows) -> None:
    """Write the output projection that suits the units as they are."""
    start = fit.matrix(mlp.reader)
    own = {site: layer_weights(fit, site) for site in mlp.writers}
    gram = fit.gram(start)
    gram.add(units(fit, mlp, rows.x, own), rows.y, rows.weight)
    fit.write(mlp.reader, *ridge(gram.reduce(fit.all_reduce), start, fit.config.ridge, mlp.reader.bias is not None))


def spread(fit: Fit, rows: FittedRows) -> float:
    """The stream's weighted squared deviation from its mean."""
    square = fit.all_reduce(rows.weight @ rows.stream.square().sum(1))
    total, count = fit.all_reduce(rows.weight @ rows.stream), fit.all_reduce(rows.weight.sum())
    return float(square - total @ total / count.clamp_min(1e-30))


def split_rows(fit: Fit, mlp: Mlp) -> tuple[FittedRows, FittedRows]:
    """The rows that are fitted, and those of samples that are held out."""
    width = fit.values.merged[mlp.reader.weight].shape[mlp.reader.input_axis]
    weights = min(width * (1 + len(mlp.writers)), ENOUGH // EQUATIONS)  # for every number that the layer puts out
    parts: tuple[list[list[Tensor]], ...] = ([], [])
    for b, batch in enumerate(fit.values.batches):
        x = fit.values.of(mlp.input, MERGED, b)
        rows, picked = fit.rows.pick(x.shape, b, -1, weights, EQUATIONS)
        target, stream = fit.targets.of(mlp.reader, b, rows), fit.targets.reached(mlp.reader, b, rows)
        own = [at_rows(x, -1, rows), target, stream, picked.to(x)]
        count = x.shape[:-1].numel()
        sample = batch.first + torch.arange(count, device=x.device)[rows] * batch.size // count
        held = sample % HELD_OUT == HELD_OUT - 1
        parts[0].append([part[~held] for part in own])
        parts[1].append([part[held] for part in own])
    fit.targets.forget(mlp.reader)
    return tuple(FittedRows(*map(torch.cat, zip(*found, strict=True))) for found in parts)  # type: ignore[return-value]
