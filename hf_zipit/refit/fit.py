"""What all solvers of one refit share: the values so far, the rows, settings, targets and the regression error.

A target is the merged units' share of what the experts' modules compute. On samples that are known to come from task
t, expert t weighs w and the others share 1 - w. A module that writes into a residual stream aims at the stream itself:
the experts' stream after the addition minus the merged stream before it, so that errors are corrected instead of
adding up. Of a stream that a norm alone reads only the direction matters: all experts' are brought to one deviation,
row by row, for the share of what their norms put out is what the merged norm should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from hf_zipit.config import RefitConfig
from hf_zipit.data.processes import solving_device
from hf_zipit.errors import SpecError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import features_to_merged, only_groups, shares_held
from hf_zipit.refit.positions import Picked, Rows, at_rows
from hf_zipit.refit.regression import Gram
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.values import MERGED, Values
from hf_zipit.symmetry.ops import op_name, shape_of
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key


class Targets:
    """The targets of one refit, from the experts' values as they are computed."""

    def __init__(self, values: Values, spec: MergeSpec, alignment: Alignment, config: RefitConfig) -> None:
        self.values, self.spec, self.alignment, self.config = values, spec, alignment, config
        self._scales: dict[tuple[AxisLabel, int | None], Tensor | None] = {}
        self._rows: dict[tuple[RefitSite, str, int], Picked | None] = {}
        self._orders: dict[tuple[AxisLabel, int], slice | Tensor | None] = {}

    def label(self, site: RefitSite) -> AxisLabel:
        """The units of what a site puts out, of the residual stream where it writes into one."""
        return site.label(self.spec)

    def of(self, site: RefitSite, b: int, rows: Picked | None = None) -> Tensor:
        """What a site should put out: its share of the experts' output, or what the residual stream still lacks.

        Of `rows` alone, `[rows, units]`, where they are given; the units are then the last axis.
        """
        target = self.reached(site, b, rows)
        if site.stream is None or site.other is None:
            return target
        other = self.summands(site, b)
        if rows is not None:
            shape = shape_of(site.stream)
            shape[site.target_axis] = -1
            other = at_rows(other.expand(shape), site.target_axis, rows)
        return target - other

    def summands(self, site: RefitSite, b: int) -> Tensor:
        """What the merged model adds to a writer's output to make the stream."""
        return sum((self.values.of(node, MERGED, b) for node in site.more), self.values.of(site.other, MERGED, b))

    def reached(self, site: RefitSite, b: int, rows: Picked | None = None) -> Tensor:
        """What a site's output, or the stream that it writes into, should be; remembered until `forget`."""
        key = (site, "target", b)
        if key not in self.values.store or self._rows[key] is not rows:
            self._rows[key] = rows
            node = site.stream or site.output
            if site.behind is None:
                self.values.store[key] = self.share(node, site.target_axis, self.label(site), b, rows)
            else:
                self.values.store[key] = self._before_norm(site, b, rows)
        return self.values.store[key]

    def _before_norm(self, site: RefitSite, b: int, rows: Picked | None) -> Tensor:
        """What the stream lacks behind a norm, as rows that are as long before the norm as the experts' are there.

        The gain is taken out, but of units that hardly have one: those stay the experts' share.
        """
        norm, gain = site.behind, site.aim
        assert norm is not None
        lacking = self.of(gain, b, rows)
        lengths = torch.zeros_like(lacking[..., :1])
        for t, weight in zip(self.values.experts, self.weights(self.values.batches[b].task), strict=True):
            own = self.values.of(site.output, t, b)
            own = own if rows is None else at_rows(own, -1, rows)
            normed = self.values.follow(norm.ops[:-1], {site.output: own}, t, b)[norm.ops[-2]]
            one, other = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (own, normed))
            lengths += weight * one / other.clamp_min(1e-30)
        share = self.share(site.output, -1, self.label(site), b, rows)
        scale = self.values.merged[gain.weight] + gain.constant
        least = FAINT_GAIN * scale.abs().mean().clamp_min(1e-12)
        return share + (lacking * lengths - scale * share) * scale / (scale.square() + least.square())

    def know(self, site: RefitSite, b: int, rows: Picked, value: Tensor) -> None:
        """Remember what a site's output should be, where that is no share of what the experts put out there."""
        self.values.store[site, "target", b] = value
        self._rows[site, "target", b] = rows

    def forget(self, site: RefitSite) -> None:
        """Of a site that is done."""
        for b in range(len(self.values.batches)):
            self.values.store.pop((site, "target", b))
            self._rows.pop((site, "target", b), None)
        if site.behind is not None:
            self.forget(site.aim)

    def share(self, node: fx.Node, axis: int, label: AxisLabel, b: int, rows: Picked | None = None) -> Tensor:
        """The merged units' share of the experts' values: `sum_t share_t T M_t y_t`, the shares summing to one."""
        found = [as_traced(node, self.values.of(node, t, b)) for t in self.values.experts]
        return self.share_of(found, axis, label, b, rows, normed_next(node))

    def share_of(
        self,
        found: Sequence[Tensor],
        axis: int,
        label: AxisLabel,
        b: int,
        rows: Picked | None = None,
        normed: bool = False,
    ) -> Tensor:
        """The same of values that are given; `normed`: a norm alone reads them, so that only directions matter."""
        total: Tensor | None = None
        units = axis if rows is None else -1
        task = self.values.batches[b].task
        weights = self.weights(task)
        found = [y if rows is None else at_rows(y, axis, rows) for y in found]
        if axis == -1 and normed:
            found = with_one_deviation(found, weights)
        for t, (y, weight) in enumerate(zip(found, weights, strict=True)):
            y = self._in_merged_units(y, units, label, t)
            total = y * weight if total is None else total.add_(y, alpha=weight)
        assert total is not None
        scale = self._scale(label, task)
        if scale is None:
            return total
        return total * scale.to(total).reshape(-1, *(1 for _ in total.shape[units % total.dim() + 1 :]))

    def weights(self, task: int | None) -> list[float]:
        """How much each expert counts in the target of samples of a task."""
        return self.config.shares(task, len(self.values.experts))

    def _in_merged_units(self, y: Tensor, axis: int, label: AxisLabel, expert: int) -> Tensor:
        """T M_t y; where the map is one-to-one only a look-up, or nothing at all."""
        if (label, expert) not in self._orders:
            self._orders[label, expert] = self._order(label, expert, y.shape[axis])
        order = self._orders[label, expert]
        if order is None:
            return features_to_merged(y, axis, label, self.alignment, self.spec, expert)
        return y if isinstance(order, slice) else y.index_select(axis, order)

    def _order(self, label: AxisLabel, expert: int, units: int) -> slice | Tensor | None:
        """Which of an expert's units each merged unit is, a slice where all stay in their places; None where merged
        units are made of several or none."""
        if not only_groups(self.alignment, product_key(label)):
            return None
        ones = shares_held(label, self.alignment, self.spec, expert)
        numbers = features_to_merged(torch.arange(units).double(), 0, label, self.alignment, self.spec, expert)
        alone = len(ones) == units and bool((ones == 1).all())
        found, places = numbers.round().long(), torch.arange(units)
        if not alone or not torch.equal(found.sort().values, places):
            return None
        return slice(None) if torch.equal(found, places) else found.to(self.values.device)

    def _scale(self, label: AxisLabel, task: int | None) -> Tensor | None:
        """For every merged unit the sum of its experts' equal shares over that of their real shares; None for ones."""
        if (label, task) not in self._scales:
            held = torch.stack([shares_held(label, self.alignment, self.spec, t).float() for t in self.values.experts])
            scale = held.mean(0) / (torch.tensor(self.weights(task)) @ held).clamp_min(1e-12)
            self._scales[label, task] = None if bool((held == 1).all()) else scale
        return self._scales[label, task]


COSTLY = 2**29
"""About so many products for every row are what a grouped convolution's moments may take: 2 rows an input at least."""


def most_rows(site: RefitSite, inputs: int) -> int | None:
    """The most rows per input of a regression, where there are many of them side by side; None where all count."""
    return None if site.groups == 1 else max(COSTLY // (inputs**2 * site.groups), 2)


FAINT = 1e-3
"""Scales of a writer into a stream count at least this share of their mean: next to none cannot be divided by."""


FAINT_GAIN = 1e-2
"""A norm's gain that is a smaller share of their mean tells next to nothing of what should be before it."""


def scale_of(site: RefitSite, values: Values, who: int) -> Tensor | float:
    """What a model multiplies a site's output by before it is added to a stream, away from zero."""
    if not isinstance(site.scale, fx.Node):
        return 1.0 if site.scale is None else site.scale
    scale = values.of(site.scale, who, 0)
    least = FAINT * scale.abs().mean().clamp_min(1e-12)
    return torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale)


def as_traced(node: fx.Node, value: Tensor) -> Tensor:
    """The value of a node; raises SpecError where it is not as large as in the trace, which holds for all samples."""
    if value.numel() != prod(shape_of(node)):
        raise SpecError(
            f"The refit follows a forward pass in which {node.name} is {shape_of(node)}, and on some samples it is "
            f"{list(value.shape)}: it must not depend on the samples how many numbers there are; merge with refit=None"
        )
    return value


def normed_next(node: fx.Node) -> bool:
    """Whether a layer norm reads a value, and nothing else does."""
    return len(node.users) == 1 and op_name(next(iter(node.users))) == "layer_norm"


def with_one_deviation(values: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Experts' values `[..., units]`, every row scaled to the weighted mean of the experts' deviations there."""
    spreads = [y.std(-1, correction=0, keepdim=True).clamp_min(1e-12) for y in values]
    common = sum(weight * spread for weight, spread in zip(weights, spreads, strict=True))
    return [y * (common / spread) for y, spread in zip(values, spreads, strict=True)]


@dataclass(frozen=True)
class Fit:
    """One refit.

    Attributes:
        tasks: in the order of the experts.
        spec, alignment: the spaces, and each one's maps.
        values: what the ops of the forward pass give.
        rows: which of them enter a regression; `targets`: what they should be.
        all_reduce: sums a tensor over all processes.

    Values are float32 on their device; what is summed up and solved is float64, on `home`.
    """

    tasks: tuple[str, ...]
    spec: MergeSpec
    alignment: Alignment
    config: RefitConfig
    values: Values
    rows: Rows
    targets: Targets
    all_reduce: Callable[[Tensor], Tensor]

    @property
    def home(self) -> torch.device:
        """Where float64 is: the values' device, or the CPU where that knows none."""
        return solving_device(self.values.device)

    def gram(self, start: Tensor) -> Gram:
        """Sums for a regression that starts from a slope `[k, d]`."""
        return Gram(start.shape[1], start.shape[0], start, self.home)

    def zeros(self, *shape: int) -> Tensor:
        """Sums, float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.home)

    def pick(self, site: RefitSite, b: int) -> tuple[Picked, Tensor]:
        """The rows of a site's value that enter its regression, and their weights."""
        inputs = self.inputs(site)
        shape = shape_of(site.stream or site.output)
        return self.rows.pick(shape, b, site.target_axis, inputs, most_rows(site, inputs))

    def inputs(self, site: RefitSite) -> int:
        """How many inputs the regression of a site has; of one that goes unit by unit, how many units."""
        shape = list(self.values.merged[site.weight].shape)
        outputs = shape.pop(site.unit_axis)
        return prod(shape) if site.kind in ("linear", "conv") else outputs

    def matrix(self, site: RefitSite, who: int = MERGED) -> Tensor:
        """A linear map's weight `[outputs, inputs]`, of the merged model or of an expert, its scale included."""
        weight = self.values.tensors[who][site.weight]
        weight = (weight.mT if site.turned else weight)[site.rows]
        return weight if site.scale is None else (weight.mT * scale_of(site, self.values, who)).mT

    def bias(self, site: RefitSite, who: int = MERGED) -> Tensor | None:
        """What a linear map or a convolution adds, its scale left out; None if it has no bias."""
        return None if site.bias is None else self.values.tensors[who][site.bias][site.rows]

    def affine(self, site: RefitSite) -> tuple[Tensor, Tensor | None]:
        """The merged model's weight `[outputs, inputs]` and bias `[outputs]`, if it has one, their scale included."""
        bias = self.bias(site)
        scale = scale_of(site, self.values, MERGED)
        return self.matrix(site).float().clone(), None if bias is None else (bias * scale).float().clone()

    def outputs(self, site: RefitSite) -> int:
        """How many units the merged model puts out at a site."""
        return self.values.merged[site.weight].shape[site.unit_axis] if site.part is None else site.part[1]

    def into_stream(self, site: RefitSite, x: Tensor) -> Tensor:
        """What goes into the stream of what a site puts out `[..., units]`: that, or what the norm behind it makes."""
        if site.behind is None:
            return x
        return self.values.follow(site.behind.ops, {site.output: x}, MERGED, 0)[site.aim.node]

    def input_label(self, site: RefitSite) -> AxisLabel:
        """The units of a linear map's input."""
        return self.spec.axes[site.weight][site.input_axis]

    def write(
        self, site: RefitSite, weight: Tensor, bias: Tensor | None = None, rows: slice | Tensor | None = None
    ) -> None:
        """Put a solution into the merged model, of some of a linear map's outputs where `rows` says which.

        Where a site has no bias, none is written. What its output is multiplied by later is taken out.
        """
        tensors = self.values.merged
        if site.part is not None:
            inside = torch.arange(*site.rows.indices(1 << 60))
            rows = inside if rows is None else inside[rows]
        if site.scale is not None:
            scale = torch.as_tensor(scale_of(site, self.values, MERGED)).to(weight)
            weight, bias = (weight.mT / scale).mT, None if bias is None else bias / scale
        if site.length is not None:
            lengths = tensors[site.length]
            over = [axis for axis, size in enumerate(lengths.shape) if size == 1]
            directions = weight.reshape(tensors[site.weight].shape)
            tensors[site.length] = directions.square().sum(over, keepdim=True).sqrt().to(lengths)
        for name, solution in ((site.weight, weight), (site.bias, bias)):
            if name is not None and solution is not None:
                turned = site.turned and name == site.weight
                if rows is not None:
                    whole = (tensors[name].mT if turned else tensors[name]).clone()
                    whole[rows] = solution.to(whole)
                    solution = whole
                solution = solution.mT if turned else solution
                tensors[name] = solution.reshape(tensors[name].shape).to(tensors[name]).contiguous()


def rows_used(fit: Fit, site: RefitSite) -> tuple[int, int]:
    """How many rows entered a site's regression, and how many could have, of all processes."""
    shape, inputs = shape_of(site.stream or site.output), fit.inputs(site)
    counts = [fit.rows.counts(shape, b, site.channel_axis, inputs) for b in range(len(fit.values.batches))]
    used, known = fit.all_reduce(torch.tensor(counts, dtype=torch.float64, device=fit.home).sum(0)).tolist()
    return int(used), int(known)


UNKNOWN_TASK = "unknown task"
"""What a report calls samples whose task is unknown."""


def relative_errors(fit: Fit, site: RefitSite) -> dict[str, float]:
    """The squared error on every task's samples, as a share of the target's spread there."""
    kinds = [*fit.tasks, UNKNOWN_TASK]
    found = zip(kinds, *squared_errors(fit, site), strict=True)
    return {kind: float(off / spread.clamp_min(1e-12)) for kind, off, spread in found if spread > 0}


def squared_errors(fit: Fit, site: RefitSite) -> tuple[Tensor, Tensor]:
    """What a site's output lacks, now that it was run with its weights.

    Returns:
        The weighted squared error and the weighted squared deviation of the target from its mean, both `[T + 1]`: for
        samples of each task and, last, of unknown ones. For a writer into a residual stream, those of the stream.
    """
    width = fit.outputs(site)
    sums = fit.zeros(len(fit.tasks) + 1, width + 3)
    for b, batch in enumerate(fit.values.batches):
        made = _made(fit, site, b)
        rows, weight = fit.pick(site, b)
        y = fit.targets.reached(site, b, rows)
        off = at_rows(made, site.target_axis, rows) - y
        squares = [torch.linalg.vector_norm(part, dim=1).square() for part in (off, y)]
        scalars = torch.stack([weight * part for part in (*squares, torch.ones_like(weight))]).to(sums).sum(1)
        task = len(fit.tasks) if batch.task is None else batch.task
        sums[task] += torch.cat([scalars, (weight @ y).to(sums)])
    sums = fit.all_reduce(sums)
    off, square, rows = sums[:, :3].T
    spread = square - sums[:, 3:].square().sum(1) / rows.clamp_min(1e-12)
    return off, torch.where(spread > 1e-6 * square, spread, 0.0)  # below it is rounding


def _made(fit: Fit, site: RefitSite, b: int) -> Tensor:
    """The merged model's value where a site is measured."""
    made = fit.values.of(site.output, MERGED, b)
    if site.stream is None or site.stream is site.node:
        return made
    if site.scale is not None:
        made = made * scale_of(site, fit.values, MERGED)
    if site.stream_axis is not None:
        made = made.movedim(site.channel_axis, site.stream_axis)
    return made + fit.targets.summands(site, b)
