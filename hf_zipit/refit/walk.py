"""The refit: walk the trunk in execution order and regress every module on what the experts' modules compute.

All calibration micro-batches advance together through the exported forward pass, of the experts and of the merged
model. At a module with weights

- the input x is what the *merged* model feeds into it, every earlier module already refitted;
- the target is the merged units' share of what the experts' same module puts out on the same samples. On samples that
  are known to come from task t, expert t weighs w and the others share 1 - w;
- a module that writes into a residual stream aims at the stream itself: the experts' stream after the addition minus
  the merged stream before it, so that errors are corrected instead of adding up;
- weights are solved by ridge regression (`regression.py`) towards the combined weights, and the walk goes on with
  them.

Batch norms are folded into their convolution and restored with statistics that belong to the new weights. The affine
part of a norm is regressed channel by channel. Where a branch leaves the trunk, U_t becomes the linear map that best
reconstructs expert t's own features; for a linear head that is the regression on its logits.

Ours; relatives are PLeaS (arXiv 2407.02447) and RegMean++. What must hold: experts that compute the same (a model and
its permuted copy) are a fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from tqdm.auto import tqdm

from hf_zipit.align.maps import Alignment
from hf_zipit.align.products import merged_sizes
from hf_zipit.combine.transform import features_to_merged, only_groups, shares_held, unmerge_matrix
from hf_zipit.errors import SpecError
from hf_zipit.planning.cut import Cut, Entry
from hf_zipit.refit.attention import Attention, find_attention, heads_and_width
from hf_zipit.refit.attention_solver import AttentionSolver
from hf_zipit.refit.batches import MicroBatch
from hf_zipit.refit.config import RefitConfig
from hf_zipit.refit.convolution import folded, patches
from hf_zipit.refit.graph import Program, Site, find_sites
from hf_zipit.refit.positions import Positions
from hf_zipit.refit.regression import ChannelSums, Gram, ridge, scale_and_shift
from hf_zipit.refit.report import RefitReport
from hf_zipit.refit.splitting import split_ops, variant
from hf_zipit.refit.store import MERGED, Store
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key

Rows = Tensor | slice
"""Some of a value's samples times positions."""

UNKNOWN_TASK = "unknown task"
"""What a report calls samples of which nobody said the task."""


@dataclass(frozen=True)
class Refitted:
    """What the walk returns.

    Attributes:
        tensors: the trunk's new tensors.
        doors: per entry or exit and task `(weight [d, k], bias [d])`: from merged units to the expert's own.
        head_dims: by path the width of a head in attention layers whose heads were split.
        report: the regression errors.
        peak_bytes: the most memory that activations took.
    """

    tensors: dict[str, Tensor]
    doors: dict[Entry, list[tuple[Tensor, Tensor]]]
    head_dims: dict[str, int]
    report: RefitReport
    peak_bytes: int


class Walk:
    """One refit. Make it, then `run()` it."""

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[Mapping[str, Tensor]],
        merged: Mapping[str, Tensor],
        batches: Sequence[MicroBatch],
        *,
        tasks: Sequence[str],
        spec: MergeSpec,
        cut: Cut,
        alignment: Alignment,
        config: RefitConfig,
        positions: Positions,
        fields: tuple[str, ...] | None = None,
        add_up: Callable[[Tensor], Tensor] = lambda x: x,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """See `stage.refit`; `add_up` sums a tensor over all processes, `fields` are the outputs that count."""
        export = partial(Program, inputs=batches[0].inputs, fields=fields, trunk=cut.trunk)
        self.program = export(model)
        wide = any(tensor.shape != experts[0][name].shape for name, tensor in merged.items())
        shapes = merged_shapes(spec, alignment) if wide else {}
        if wide:
            self.program.adopt_sizes(self.program.twins(export(variant(model, shapes, {}))))
        self.tensors = [*experts, {**experts[0], **merged}]  # the last one, at index MERGED, is the merged model
        self.batches = batches
        self.tasks, self.spec, self.cut, self.alignment = tuple(tasks), spec, cut, alignment
        self.config, self.positions, self.add_up = config, positions, add_up
        self.seed, self.progress = seed, progress
        self.sites = find_sites(self.program, cut.trunk, spec.head)
        self.attention = self._find_attention()
        self.split_ops: dict[fx.Node, fx.Node] = {}
        if config.split_heads:
            self.split_ops = split_ops(self.program, self.attention.values(), model, shapes, len(tasks), export)
        self.head_dims: dict[str, int] = {}
        self.in_attention = {site.node for layer in self.attention.values() for site in layer.inputs}
        self.waiting = {
            node
            for solved_at, layer in self.attention.items()
            for node in layer.ops
            if self.program.position[node] < self.program.position[solved_at]
        }  # their weights are not solved when they are reached
        self.expiring = self._find_expiring()
        self.doors = self._find_doors()
        self.all_batches = int(add_up(torch.tensor(float(len(batches)))))
        self.scales: dict[tuple[AxisLabel, int | None], Tensor | None] = {}
        self.orders: dict[tuple[AxisLabel, int], Tensor | None] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.ahead = 0

    # The walk --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> Refitted:
        """Walk to the last node that the trunk or a door needs."""
        nodes, position = self.program.nodes, self.program.position
        reached = [position[site.stream or site.output] for site in self.sites.values()]
        reached += [position[node] for node in self.doors.values()]
        end = max(reached, default=-1)
        solved: dict[Entry, list[tuple[Tensor, Tensor]]] = {}
        with Store(self.config.memory_gb * 2**30) as store, self._bar() as bar:
            self.store = store
            for i, node in enumerate(nodes[: end + 1]):
                self._advance_experts(i)
                site = self.sites.get(node) if node not in self.in_attention else None
                if site is not None:
                    self._advance_experts(position[site.stream or site.output])
                    self._solve(site)
                elif node in self.attention:
                    layer = self.attention[node]
                    self._advance_experts(position[layer.output.stream or layer.output.output])
                    AttentionSolver(self, layer, self.split_ops.get(layer.node)).solve()
                if node not in self.waiting:
                    self._compute(node, MERGED)
                for entry, source in self.doors.items():
                    if source is node:
                        solved[entry] = self._solve_door(entry, node)
                if site is not None:
                    error = self._note(site)
                    bar.set_postfix_str(f"{site.module}, error {error:.3f}", refresh=False)
                    bar.update()
                self._forget(i)
            peak = store.peak
        changed = {name: self.tensors[MERGED][name] for name in self.cut.trunk}
        report = RefitReport(self.tasks, self.errors, self._untouched())
        return Refitted(changed, solved, self.head_dims, report, peak)

    def _untouched(self) -> tuple[str, ...]:
        """Tensors of the trunk that have no site and keep their combined values."""
        solved = set()
        for site in self.sites.values():
            solved |= {site.weight, site.bias, *(self._norm_names(site).values() if site.norm is not None else ())}
        read = self.cut.trunk & self.spec.axes.keys() - solved
        return tuple(sorted(name for name in read if self.tensors[MERGED][name].is_floating_point()))

    def _bar(self) -> tqdm:
        return tqdm(
            total=len(self.sites) - len(self.in_attention),
            desc="refit",
            unit="module",
            disable=not self.progress,
            leave=False,
        )

    def _advance_experts(self, upto: int) -> None:
        """The experts run ahead of the merged model where a target lies ahead: at the end of a residual branch."""
        while self.ahead <= upto:
            for expert in range(len(self.tasks)):
                self._compute(self.program.nodes[self.ahead], expert)
            self.ahead += 1

    def _compute(self, node: fx.Node, who: int) -> None:
        for b, batch in enumerate(self.batches):
            self.store[node, who, b] = self.program.run(
                node, lambda used, b=b: self.store[used, who, b], self.tensors[who], batch.inputs, who == MERGED
            )

    def value(self, node: fx.Node, who: int, b: int) -> Tensor:
        name = self.program.tensor_of(node)
        if name is not None:
            return self.tensors[who][name]
        return self.batches[b].inputs[node.name] if node.op == "placeholder" else self.store[node, who, b]

    def peek(self, node: fx.Node, b: int, known: Mapping[fx.Node, Tensor]) -> Any:
        """A later value of the merged model, from values that are there and `known` ones; not kept."""
        if node in known:
            return known[node]
        if (node, MERGED, b) in self.store:
            return self.store[node, MERGED, b]
        own, inputs = self.tensors[MERGED], self.batches[b].inputs
        return self.program.run(node, lambda used: self.peek(used, b, known), own, inputs, True)

    def run_again(self, changed: Iterable[fx.Node], upto: fx.Node) -> None:
        """Bring the merged model's values before a node up to date after weights were written."""
        stale = set(changed)
        for node in self.program.nodes[: self.program.position[upto]]:
            if node in stale or not stale.isdisjoint(node.all_input_nodes):
                stale.add(node)
                self._compute(node, MERGED)

    def split(self, layer: Attention) -> None:
        """Go on with narrower heads in an attention layer."""
        assert layer.module is not None
        self.program.adopt_sizes({node: self.split_ops[node] for node in layer.between})
        self.head_dims[layer.module] = heads_and_width(self.split_ops[layer.node])[1]

    def _find_attention(self) -> dict[fx.Node, Attention]:
        """The attention layers that are solved as a whole, by the last of the three maps that their inputs enter."""
        layers = (
            layer
            for layer in find_attention(self.program, self.sites, self.spec)
            if all(self._keeps_width(site) for site in layer.inputs)
        )
        return {max((s.node for s in layer.inputs), key=self.program.position.__getitem__): layer for layer in layers}

    def _keeps_width(self, site: Site) -> bool:
        """Whether there is one merged unit for every unit of an expert: no head was kept apart."""
        label = product_key(self.spec.axes[site.weight][0])
        return prod(merged_sizes(label, self.alignment, self.spec)) == self.spec.size(label)

    def _find_expiring(self) -> dict[int, list[fx.Node]]:
        """By position the nodes whose values nobody reads after it."""
        last = {node: self.program.last_use.get(node, i) for i, node in enumerate(self.program.nodes)}
        for solved_at, layer in self.attention.items():
            for node in (*layer.ops, *(site.node.args[0] for site in layer.inputs)):
                if node in last:
                    last[node] = max(last[node], self.program.position[solved_at])
        expiring: dict[int, list[fx.Node]] = {}
        for node, position in last.items():
            expiring.setdefault(position, []).append(node)
        return expiring

    def _forget(self, i: int) -> None:
        for node in self.expiring.get(i, ()):
            for b in range(len(self.batches)):
                for who in (MERGED, *range(len(self.tasks))):
                    self.store.pop((node, who, b))

    # Targets ---------------------------------------------------------------------------------------------------------

    def _shares(self, task: int | None) -> list[float]:
        """How much each expert counts in the target of samples of a task."""
        count = len(self.tasks)
        if task is None:
            return [1 / count] * count
        # Never quite zero: units that only other experts have are to be what they are there, on these samples too.
        others = max((1 - self.config.own_weight) / (count - 1), 1e-9)
        return [self.config.own_weight if t == task else others for t in range(count)]

    def _target(self, node: fx.Node, axis: int, label: AxisLabel, b: int, rows: Rows | None = None) -> Tensor:
        """The merged units' share of the experts' values: `sum_t share_t T M_t y_t`, the shares summing to one.

        Of `rows` alone, `[rows, units]`, where they are given; the units are then the last axis.
        """
        total: Tensor | float = 0.0
        for t, share in enumerate(self._shares(self.batches[b].task)):
            y = self.store[node, t, b] if rows is None else self.store[node, t, b].flatten(0, -2)[rows]
            total = total + share * self._in_merged_units(y, axis, label, t)
        assert isinstance(total, Tensor)
        scale = self._scale(label, self.batches[b].task, y.shape[axis])
        if scale is None:
            return total
        return total * scale.reshape(-1, *(1 for _ in total.shape[axis % total.dim() + 1 :]))

    def _in_merged_units(self, y: Tensor, axis: int, label: AxisLabel, expert: int) -> Tensor:
        """T M_t y; where the map is one-to-one only a look-up, or nothing at all."""
        if (label, expert) not in self.orders:
            self.orders[label, expert] = self._order(label, expert, y.shape[axis])
        order = self.orders[label, expert]
        if order is None:
            return features_to_merged(y, axis, label, self.alignment, self.spec, expert)
        return y if torch.equal(order, torch.arange(len(order))) else y.index_select(axis, order)

    def _order(self, label: AxisLabel, expert: int, units: int) -> Tensor | None:
        """Which of an expert's units each merged unit is; None where merged units are made of several or none."""
        if not only_groups(self.alignment, product_key(label)):
            return None
        ones = shares_held(label, self.alignment, self.spec, expert)
        numbers = features_to_merged(torch.arange(units).double(), 0, label, self.alignment, self.spec, expert)
        alone = len(ones) == units and bool((ones == 1).all())
        found = numbers.round().long()
        return found if alone and torch.equal(found.sort().values, torch.arange(units)) else None

    def _scale(self, label: AxisLabel, task: int | None, units: int) -> Tensor | None:
        """For every merged unit the sum of its experts' equal shares over that of their real shares; None for ones."""
        if (label, task) not in self.scales:
            held = torch.stack(
                [shares_held(label, self.alignment, self.spec, t).float() for t in range(len(self.tasks))]
            )
            scale = held.mean(0) / (torch.tensor(self._shares(task)) @ held).clamp_min(1e-12)
            self.scales[label, task] = None if bool((held == 1).all()) else scale
        return self.scales[label, task]

    def rows_weight(self, value: Tensor, b: int, channel_axis: int) -> Tensor:
        """The weight of every row of a value, `[samples * positions]`; ones for a value that is no sample's."""
        batch = self.batches[b]
        shape = [n for i, n in enumerate(value.shape) if i != channel_axis % value.dim()]
        if value.dim() < 2 or shape[0] != batch.size:
            return torch.ones(shape).reshape(-1)
        weights = None
        if value.dim() == 3 and channel_axis % 3 == 2:
            weights = self.positions.weights(batch.inputs, value.shape[1])
        weights = torch.ones(shape) if weights is None else weights.clone()
        weights[batch.real :] = 0
        return weights.reshape(-1)

    # Solving ---------------------------------------------------------------------------------------------------------

    def _solve(self, site: Site) -> None:
        getattr(self, f"_solve_{site.kind}")(site)

    def aim(self, site: Site, axis: int, label: AxisLabel, b: int, rows: Rows | None = None) -> Tensor:
        """What a site should put out: its share of the experts' output, or what the residual stream still lacks."""
        if site.stream is None or site.other is None:
            return self._target(site.output, axis, label, b, rows)
        target, other = self._target(site.stream, axis, label, b, rows), self.value(site.other, MERGED, b)
        if rows is not None:
            other = other.expand(*site.stream.meta["val"].shape[:-1], -1).flatten(0, -2)[rows]
        return target - other

    def _solve_linear(self, site: Site) -> None:
        label = self.spec.output_label(site.weight, 0)
        weight = self.tensors[MERGED][site.weight]
        gram = Gram.empty(weight.shape[1], weight.shape[0], weight)
        for b in range(len(self.batches)):
            x = self.value(site.node.args[0], MERGED, b)  # type: ignore[arg-type]
            rows, picked = self.sample(self.rows_weight(x, b, -1), weight.shape[1], b)
            gram.add(x.flatten(0, -2)[rows], self.aim(site, -1, label, b, rows), picked)
        slope, shift = ridge(gram.reduce(self.add_up), weight, self.config.ridge, site.bias is not None)
        self.write(site, slope, shift)

    def _solve_conv(self, site: Site) -> None:
        label = self.spec.output_label(site.weight, 0)
        weight = self.tensors[MERGED][site.weight]
        bias = self.tensors[MERGED].get(site.bias) if site.bias else None
        flat = weight.flatten(1)
        prior, _ = folded(flat, bias, self._norm_tensors(site))
        gram = Gram.empty(flat.shape[1], flat.shape[0], prior)
        for b in range(len(self.batches)):
            x = self.value(site.node.args[0], MERGED, b)  # type: ignore[arg-type]
            y = self.aim(site, 1, label, b)
            rows, picked = self.sample(self.rows_weight(y, b, 1), flat.shape[1], b)
            gram.add(patches(x, weight, site.node)[rows], y.flatten(2).mT.flatten(0, 1)[rows], picked)
        gram = gram.reduce(self.add_up)
        slope, shift = ridge(gram, prior, self.config.ridge, site.bias is not None or site.norm is not None)
        self.write(site, slope, shift, gram)

    def _solve_embedding(self, site: Site) -> None:
        """Each row is the weighted mean of its targets; rows that no sample uses keep the combined values."""
        label = self.spec.axes[site.weight][1]
        table = self.tensors[MERGED][site.weight]
        total = torch.zeros(table.shape, dtype=torch.float64)
        count = torch.zeros(len(table), dtype=torch.float64)
        for b in range(len(self.batches)):
            indices = self.value(site.node.args[1], MERGED, b)  # type: ignore[arg-type]
            y = self.aim(site, -1, label, b)
            indices = indices.expand(y.shape[:-1]).reshape(-1)
            weight = self.rows_weight(y, b, -1)
            total.index_add_(0, indices, (y.flatten(0, -2) * weight[:, None]).double())
            count.index_add_(0, indices, weight.double())
        total, count = self.add_up(total), self.add_up(count)
        pull = self.config.ridge * count.mean().clamp_min(1e-12)
        new = (total + pull * table.double()) / (count + pull)[:, None]
        self.tensors[MERGED][site.weight] = new.to(table.dtype)

    def _solve_norm(self, site: Site) -> None:
        label = self.spec.output_label(site.weight, 0)
        assert site.bias is not None
        scale = self.tensors[MERGED][site.weight]
        channels = ChannelSums.empty(len(scale))
        for b in range(len(self.batches)):
            x = self.value(site.node.args[0], MERGED, b)  # type: ignore[arg-type]
            rows, picked = self.sample(self.rows_weight(x, b, -1), len(scale), b)
            eps = float(site.node.args[4])  # type: ignore[arg-type]
            normed = functional.layer_norm(x.flatten(0, -2)[rows], scale.shape, eps=eps)
            channels.add(normed, self._target(site.output, -1, label, b, rows), picked)
        channels.sums = self.add_up(channels.sums)
        new = scale_and_shift(channels, scale, self.config.ridge)
        for name, value in zip((site.weight, site.bias), new, strict=True):
            self.tensors[MERGED][name] = value.to(scale.dtype)

    def _solve_offset(self, site: Site) -> None:
        """A parameter that is added: the mean of what is missing, over the axes along which it is repeated."""
        offset = self.tensors[MERGED][site.weight]
        label = self.spec.axes[site.weight][-1]
        total: Tensor | float = 0.0
        count = 0
        for b, batch in enumerate(self.batches):
            missing = self.aim(site, -1, label, b)[: batch.real].double()
            summed = missing.sum_to_size([1] * (missing.dim() - offset.dim()) + list(offset.shape))
            total = total + summed.reshape(offset.shape)
            count += missing.numel() // offset.numel()
        total = self.add_up(torch.as_tensor(total))
        self.tensors[MERGED][site.weight] = (total / self.add_up(torch.tensor(float(count)))).to(offset.dtype)

    def sample(self, weights: Tensor, inputs: int, b: int) -> tuple[Rows, Tensor]:
        """Which rows enter a Gram matrix, and their weights.

        All that the head reads, and of the others at most a seeded share, which then counts for all of them.
        """
        limit = -(-self.config.rows_per_input * inputs // self.all_batches)
        rows = weights.nonzero().squeeze(1)
        if not limit or len(rows) <= limit:
            return (slice(None) if len(rows) == len(weights) else rows), weights[rows]
        read = weights[rows] > 1
        others = rows[~read]
        if len(others) > limit:
            generator = torch.Generator().manual_seed(self.seed + self.batches[b].number)
            drawn = others[torch.randperm(len(others), generator=generator)[:limit]]
            weights = weights.clone()
            weights[drawn] *= len(others) / limit
            rows = torch.cat([rows[read], drawn]).sort().values
        return rows, weights[rows]

    # Writing ---------------------------------------------------------------------------------------------------------

    def _norm_tensors(self, site: Site) -> dict[str, Tensor] | None:
        """The tensors of the batch norm behind a convolution, by role, and its epsilon."""
        if site.norm is None:
            return None
        roles = ("weight", "bias", "mean", "variance")
        names = self._norm_names(site)
        return {**{role: self.tensors[MERGED][names[role]] for role in roles}, "eps": torch.tensor(site.norm.args[7])}

    def _norm_names(self, site: Site) -> dict[str, str]:
        assert site.norm is not None
        found = {}
        for role, node in zip(("weight", "bias", "mean", "variance"), site.norm.args[1:5], strict=True):
            name = self.program.tensor_of(node)
            if name is None:
                raise SpecError(f"the batch norm behind {site.module} has no {role}; refit needs one")
            found[role] = name
        return found

    def write(self, site: Site, slope: Tensor, shift: Tensor, gram: Gram | None = None) -> None:
        """Put a solution into the model's own tensors; a batch norm gets the statistics of the new weights."""
        merged = self.tensors[MERGED]
        dtype = merged[site.weight].dtype
        merged[site.weight] = slope.reshape(merged[site.weight].shape).to(dtype)
        if site.norm is None:
            if site.bias is not None:
                merged[site.bias] = shift.to(dtype)
            return
        assert gram is not None
        names = self._norm_names(site)
        if site.bias is not None:
            merged[site.bias] = torch.zeros_like(merged[site.bias])
        mean_x = gram.x / gram.n.clamp_min(1e-12)
        covariance = gram.xx / gram.n.clamp_min(1e-12) - torch.outer(mean_x, mean_x)
        mean = slope @ mean_x
        variance = ((slope @ covariance) * slope).sum(1).clamp_min(0)
        eps = float(site.norm.args[7])  # type: ignore[arg-type]
        for role, value in {
            "mean": mean,
            "variance": variance,
            "weight": (variance + eps).sqrt(),
            "bias": shift + mean,
        }.items():
            merged[names[role]] = value.to(dtype)

    # Measuring -------------------------------------------------------------------------------------------------------

    def _note(self, site: Site) -> float:
        """Keep a site's relative error on every task's samples for the report; returns their mean."""
        off, spread = self.misfit(site)
        kinds = [*self.tasks, UNKNOWN_TASK]
        found = {kind: float(o / s.clamp_min(1e-12)) for kind, o, s in zip(kinds, off, spread, strict=True) if s > 0}
        name = site.module if site.module not in self.errors else site.weight
        self.errors[name] = found
        return sum(found.values()) / max(len(found), 1)

    def misfit(self, site: Site) -> tuple[Tensor, Tensor]:
        """What a site's output lacks, now that its node was run with its weights.

        Returns:
            The weighted squared error and the weighted squared deviation of the target from its mean, both `[T + 1]`:
            for samples of each task and, last, of unknown ones. For a writer into a residual stream, those of the
            stream.
        """
        axis, label = site.channel_axis, self.spec.output_label(site.weight, site.unit_axis)
        width = self.tensors[MERGED][site.weight].shape[site.unit_axis]
        sums = torch.zeros(len(self.tasks) + 1, width + 3, dtype=torch.float64)
        for b, batch in enumerate(self.batches):
            made = self._made(site, b)
            weight = self.rows_weight(made, b, axis)
            if axis == -1:
                rows, weight = self.sample(weight, width, b)
                y = self._target(site.stream or site.output, axis, label, b, rows)
                off = made.flatten(0, -2)[rows] - y
            else:
                target = self._target(site.stream or site.output, axis, label, b)
                y, off = (part.movedim(axis, -1).flatten(0, -2) for part in (target, made - target))
            squares = [torch.linalg.vector_norm(part, dim=1).square() for part in (off, y)]
            ones = torch.ones(len(y))
            scalars = torch.stack([(weight * part).sum(dtype=torch.float64) for part in (*squares, ones)])
            task = len(self.tasks) if batch.task is None else batch.task
            sums[task] += torch.cat([scalars, (weight @ y).double()])
        sums = self.add_up(sums)
        off, square, rows = sums[:, :3].T
        spread = square - sums[:, 3:].square().sum(1) / rows.clamp_min(1e-12)
        return off, torch.where(spread > 1e-6 * square, spread, 0.0)  # below it is rounding

    def _made(self, site: Site, b: int) -> Tensor:
        """The merged model's value where a site is measured."""
        made = self.value(site.node, MERGED, b)
        if site.norm is not None:
            own, inputs = self.tensors[MERGED], self.batches[b].inputs
            made = self.program.run(site.norm, lambda used: self.store[used, MERGED, b], own, inputs, True)
        if site.stream is None or site.stream is site.node:
            return made
        return made + self.value(site.other, MERGED, b)  # type: ignore[arg-type]

    # Doors -----------------------------------------------------------------------------------------------------------

    def _find_doors(self) -> dict[Entry, fx.Node]:
        """The node whose value each entry or exit reads."""
        doors = {}
        for entry in self.cut.entries:
            node = self.program.value_read_by(entry.target, entry.axis + 1)
            if node is None:
                raise SpecError(
                    f"nothing of the trunk enters {entry.target}; this model cannot be refitted at this depth"
                )
            doors[entry] = node
        for entry in self.cut.exits:
            doors[entry] = self.program.outputs[entry.target]
        return doors

    def _solve_door(self, entry: Entry, node: fx.Node) -> list[tuple[Tensor, Tensor]]:
        """For every task the map from the merged units to the expert's own, on the task's own samples."""
        found = []
        for t in range(len(self.tasks)):
            prior = unmerge_matrix(self.alignment, entry.key, t, self.spec)
            gram = Gram.empty(prior.shape[1], prior.shape[0], prior)
            for b, batch in enumerate(self.batches):
                if batch.task not in (None, t):
                    continue
                x = self.value(node, MERGED, b).movedim(entry.axis, -1)
                y = self.value(node, t, b).movedim(entry.axis, -1)
                gram.add(x.flatten(0, -2), y.flatten(0, -2), self.rows_weight(y, b, -1))
            found.append(ridge(gram.reduce(self.add_up), prior, self.config.ridge))
        return found


def merged_shapes(spec: MergeSpec, alignment: Alignment) -> dict[str, list[int]]:
    """The shapes of all tensors that have a space of another size in the merged model, those of the branches too."""
    resized = {name for name, space_map in alignment.items() if space_map.size != spec.spaces[name].size}
    return {
        name: [prod(merged_sizes(product_key(label), alignment, spec)) for label in labels]
        for name, labels in spec.axes.items()
        if any(factor.space in resized for label in labels for factor in label)
    }
