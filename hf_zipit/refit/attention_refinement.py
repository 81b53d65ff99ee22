"""Attention in the refit: heads are fitted to what the stream lacks, through their softmax.

Heads were chosen by their logits, and values solved for the weights that these give. Together with the output
projection they are the solution of a nonlinear least squares problem,

    min  sum_i w_i || O softmax(q(x) k(x)^T) v(x)_i + c - y_i ||^2

with x what the merged model feeds into the layer and y what the stream lacks, both known. Steps of Adam on some
samples at a time (`steps.py`), in coordinates in which the inputs of linear maps are white, bring it nearer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.refit.fit import Fit
from hf_zipit.refit.head_factors import padded
from hf_zipit.refit.merged_attention import EVERYTHING, Block, MergedAttention
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.steps import (
    Spread,
    WhiteLayer,
    Windows,
    by_row,
    looked_at,
    mean_squares,
    take_steps,
    typical_size,
    whitening_of,
)
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.ops import shape_of

EVERY = 16
"""After so many steps the samples that are held out are looked at; fewer steps are of no use."""

PASSES = 2
"""So often, at most, steps go through all samples."""

RIGHT = 0.02
"""Nothing is fitted where what is left is no more than this share of the stream's own variance."""


@dataclass(frozen=True)
class SolvedHeads:
    """A layer's heads, as they were solved.

    Attributes:
        blocks: queries and keys.
        units: those of a head's own that a merged head has; the others are zeros in the blocks.
        groups, shared_by: how many heads have values, and how many heads share one's.
        asked: what queries and keys are multiplied by where they are written, if by anything.
    """

    blocks: list[Block]
    units: slice | list[int]
    groups: int
    shared_by: int
    asked: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeadWeights:
    """Queries and keys of `SolvedHeads.units` alone; values and the output projection of heads that are not empty; and
    by name what stands between queries and keys and the logits, `SolvedApart.scales`.
    """

    blocks: list[Block]
    value: Tensor
    value_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    scales: dict[str, Tensor]

    def linear(self) -> Iterator[Tensor]:
        """The weights of linear maps."""
        for block in self.blocks:
            yield from block
        yield from (self.value, self.output)

    def biases(self) -> list[Tensor]:
        return [bias for bias in (self.value_bias, self.output_bias) if bias is not None]


def refine_attention(fit: Fit, forward: MergedAttention, heads: SolvedHeads) -> float | None:
    """Write better queries, keys and values, and an output projection, into the merged model, if there are any.

    What the layer's attention gives is up to date afterwards. Returns the share of what the stream lacks that the
    layer leaves on samples that were held out; None where nothing can be fitted.
    """
    attention = forward.attention
    if attention.apart is None and (attention.weights is not None or attention.fused):
        return None
    windows = Windows(fit)
    steps = min(fit.config.attention_steps, PASSES * len(windows))
    if steps < EVERY:
        return None
    forward.drop()
    layer = WhiteHeads(fit, forward, heads)
    errors = AttentionErrors(fit, forward, windows)
    first = errors.held_out(layer)
    found = take_steps(fit, layer, errors, first=first, steps=steps, every=EVERY, right=RIGHT * errors.spread)
    fit.targets.forget(forward.attention.output)
    if found is None:
        layer.put(layer.first)
        return float(first.mean())
    layer.write(found[0])
    return float(found[1].mean())


class WhiteHeads(WhiteLayer[HeadWeights]):
    """An attention layer as a function of its input, with parameters in which inputs of linear maps are white."""

    @torch.no_grad()
    def __init__(self, fit: Fit, forward: MergedAttention, heads: SolvedHeads) -> None:
        self.fit, self.forward, self.heads = fit, forward, heads
        attention, values = forward.attention, forward.attention.value
        width, slots = attention.width, heads.groups * heads.shared_by
        self.width = len(range(width)[heads.units]) if isinstance(heads.units, slice) else len(heads.units)
        (value, value_bias), (output, output_bias) = fit.affine(values.site), fit.affine(attention.output)
        rows = heads.groups * self.width
        apart = attention.apart
        scales = {} if apart is None else {name: fit.values.merged[name].float().clone() for name in apart.scales}
        self.first = own = HeadWeights(
            [tuple(map(self._narrow, block)) for block in heads.blocks],
            value[values.rows][:rows],
            None if value_bias is None else value_bias[values.rows][:rows],
            output[:, : slots * self.width],
            output_bias,
            scales,
        )
        read = [maps.inputs for maps in (*attention.asked, values)]
        white = {nodes: self._white(nodes) for nodes in dict.fromkeys(read)}
        *asked, mixed = [white[nodes] for nodes in read]
        means = self._whitening(self._mixed(own, b) for b in range(len(fit.values.batches)))
        self.white = [*asked * len(heads.blocks), mixed, means]
        self.own = self._turned(own, [back for _, back in self.white])
        linear, biases, between = list(self.own.linear()), self.own.biases(), list(self.own.scales.values())
        sizes = [typical_size(weight) for weight in linear]
        both = [size for size, bias in zip(sizes[-2:], (value_bias, output_bias), strict=True) if bias is not None]
        others = [typical_size(scale) for scale in between]
        self.set_parameters([*linear, *biases, *between], [*sizes, *both, *others])

    def __call__(self, b: int) -> Tensor:
        """What the layer adds to the stream of a micro-batch, `[rows, units]`."""
        own = self._now()
        put_out = functional.linear(self._mixed(own, b).flatten(0, -2), own.output, own.output_bias)
        return self.fit.into_stream(self.forward.attention.output, put_out)

    @torch.no_grad()
    def weights(self) -> HeadWeights:
        own = self._now()  # all of it new but for the biases
        biases = {name: getattr(own, name) for name in ("value_bias", "output_bias")}
        scales = {name: scale.clone() for name, scale in own.scales.items()}
        return replace(
            own, **{name: bias if bias is None else bias.clone() for name, bias in biases.items()}, scales=scales
        )

    @torch.no_grad()
    def write(self, own: HeadWeights) -> None:
        """Put weights into the merged model, and keep what attention gives with them."""
        fit, attention, heads = self.fit, self.forward.attention, self.heads
        found = map(torch.cat, zip(*own.blocks, strict=True))
        scales = [1.0] * len(attention.asked) if heads.asked is None else heads.asked
        for maps, rows, scale in zip(attention.asked, found, scales, strict=True):
            self.forward.write(maps, padded(rows * scale, maps.count))
        value, output = attention.value, attention.output
        bias = None if own.value_bias is None else padded(own.value_bias[:, None], value.count)[:, 0]
        fit.write(value.site, padded(own.value, value.count), bias, value.rows)
        fit.write(output, padded(own.output.mT, fit.matrix(output).shape[1]).mT, own.output_bias)
        for name, scale in own.scales.items():
            fit.values.merged[name] = scale
        self.put(own)

    @torch.no_grad()
    def put(self, own: HeadWeights) -> None:
        """Keep what attention gives with some weights."""
        for b in range(len(self.fit.values.batches)):
            self.forward.put(self._means(own, b), b)

    def _now(self) -> HeadWeights:
        return self._turned(self.own, [there for there, _ in self.white])

    def _turned(self, own: HeadWeights, turns: Sequence[Tensor]) -> HeadWeights:
        """Weights of other inputs; a column for a bias stays as it is."""
        weights = [
            torch.cat([weight[:, : len(turn)] @ turn, weight[:, len(turn) :]], 1)
            for weight, turn in zip(own.linear(), turns, strict=True)
        ]
        *asked, value, output = weights
        each = len(asked) // len(own.blocks)
        blocks = [tuple(asked[first : first + each]) for first in range(0, len(asked), each)]
        return HeadWeights(blocks, value, own.value_bias, output, own.output_bias, own.scales)

    def _means(self, own: HeadWeights, b: int) -> Tensor:
        """`[samples, heads, positions, width]`."""
        values = self.forward.values(own.value, own.value_bias, self.heads.groups, self.heads.shared_by, b)
        blocks = [tuple(map(self._whole, block)) for block in own.blocks]
        return self.forward.means(values, b, blocks, [own.scales] * len(blocks), self.heads.units)

    def _mixed(self, own: HeadWeights, b: int) -> Tensor:
        """What the output projection reads of the heads that are not empty, `[samples, positions, units]`."""
        return self._means(own, b).transpose(1, 2).flatten(2)

    def _narrow(self, rows: Tensor) -> Tensor:
        """Queries or keys of the units that merged heads have."""
        narrow = rows.unflatten(0, (-1, self.forward.attention.width))[:, self.heads.units].flatten(0, 1)
        return narrow.to(self.fit.values.device, torch.float32)

    def _whole(self, rows: Tensor) -> Tensor:
        """Queries or keys as wide as an expert's."""
        narrow = rows.unflatten(0, (-1, self.width))
        whole = narrow.new_zeros(len(narrow), self.forward.attention.width, narrow.shape[-1])
        whole[:, self.heads.units] = narrow
        return whole.flatten(0, 1)

    def _white(self, nodes: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
        values = self.fit.values
        return self._whitening(*((values.of(node, MERGED, b) for b in range(len(values.batches))) for node in nodes))

    def _whitening(self, *found: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Of values, all of which count the same."""
        squares = [mean_squares(self.fit, self._rows(own)) for own in found]
        return whitening_of(self.fit, sum(own for own, _ in squares) / len(squares), squares[0][1])  # type: ignore[arg-type]

    def _rows(self, found: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for b, x in enumerate(found):
            rows, weight = self.fit.rows.pick(x.shape, b, -1, x.shape[-1])
            yield at_rows(x, -1, rows), weight.to(x)


class AttentionErrors:
    """How far an attention layer is from what the stream lacks, as a share of that.

    Attributes:
        spread: how far the stream varies, as a share of the same.
    """

    @torch.no_grad()
    def __init__(self, fit: Fit, forward: MergedAttention, windows: Windows) -> None:
        self.fit, self.site, self.windows = fit, forward.attention.output.aim, windows
        self.looked_at = looked_at(fit)
        whole, lacking, spread = fit.zeros(1), fit.zeros(1), Spread(fit, fit.outputs(self.site))
        for b in range(len(fit.values.batches)):
            held, weight, y = self._split(b)
            whole += (weight * ~held) @ y.square().sum(1)
            if b in self.looked_at:
                stream, weight = fit.targets.reached(self.site, b, EVERYTHING), weight * held
                lacking += weight @ y.square().sum(1)
                spread.add(stream, weight)
        self.whole, self.lacking = (max(float(fit.all_reduce(x)), 1e-30) for x in (whole, lacking))
        self.spread = spread.total() / self.lacking

    def held_out(self, layer: WhiteHeads) -> Tensor:
        total = self.fit.zeros(1)
        with torch.no_grad():
            for b in self.looked_at:
                held, weight, y = self._split(b)
                total += ((weight * held) @ (layer(b) - y).square().sum(1)).to(total)
        return self.fit.all_reduce(total) / self.lacking

    def backward(self, layer: WhiteHeads, step: int) -> None:
        for b, seen in self.windows.seen(step):
            _, weight, y = self._split(b)
            weight = weight * by_row(seen, len(y))
            (weight @ (layer(b) - y).square().sum(1) * (len(self.windows) / self.whole)).backward()

    def _split(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows of a micro-batch are held out, what each counts, and what the stream lacks there."""
        y = self.fit.targets.of(self.site, b, EVERYTHING)
        weight = self.fit.rows.weights(shape_of(self.site.stream or self.site.output), b, self.site.target_axis)
        return by_row(self.windows.held(b), len(y)), weight.to(y), y
