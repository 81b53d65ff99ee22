"""Merge layers in the order they run, each on what the layers before it, merged already, feed into it.

As in the refit all calibration batches advance together, op by op, through the exported forward pass: of the merged
model and, on each task's own samples, of that task's expert. At a linear map, a convolution or a norm the rule is
given the second moments of both models' inputs (`Layer`), and what it makes of the weights is what the walk goes on
with. Other tensors are what the rule makes of them without a layer: tables, and the weights of ops that are no plain
linear map, as GPT-2's, or of norms that are computed in pieces, as RMSNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.adapters import adapter_for
from hf_zipit.combine.combine import CombinedTrunk
from hf_zipit.combine.layers import Layer
from hf_zipit.combine.matrices import view_of
from hf_zipit.config import RefitConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import own_features_to_merged
from hf_zipit.observation.statistics import product_sum
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.convolution import patches
from hf_zipit.refit.positions import Positions, Rows
from hf_zipit.refit.program import Program, merged_shapes, resized_copy
from hf_zipit.refit.solvable import RefitSite, find_sites
from hf_zipit.refit.stage import in_float32, kept_bytes
from hf_zipit.refit.values import MERGED, Values
from hf_zipit.symmetry.ops import shape_of
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import all_held

LAYERS = {"linear", "conv", "norm"}
"""Kinds of sites whose inputs rules are given."""


class LayerwiseWalk:
    """One walk. Make it, then `run()` it."""

    def __init__(self, planned: Plan, maps: Alignment, calibration: Calibration | None) -> None:
        """Raises DataError without calibration data, or with less of it than there are processes."""
        if calibration is None:
            raise DataError(
                f"combine={planned.config.combine!r} merges layers on what the models compute: pass a little "
                "unlabelled data as calibration="
            )
        self.planned, self.maps, self.all_reduce = planned, maps, calibration.all_reduce
        config = planned.config.refit or RefitConfig()
        batches = calibration.read(planned.experts).micro_batches(config.micro_batch)
        if len(batches) < calibration.processes:
            raise DataError(
                f"{len(batches)} micro-batches of calibration data cannot be spread over {calibration.processes} "
                "processes; give more data"
            )
        self.batches = batches[calibration.process :: calibration.processes]
        model, spec, cut = in_float32(planned.model), planned.spec, planned.cut
        export = partial(
            Program, inputs=batches[0].inputs, fields=adapter_for(model).outputs(model), trunk=cut.trunk,
            device=calibration.device,
        )  # fmt: skip
        self.program = export(model)
        self.combiner = CombinedTrunk(planned, maps)
        merged = {name: self.combiner.tensor(name) for name in sorted(cut.trunk)}
        experts = [model_tensors(expert) for expert in planned.folded.values()]
        if any(tensor.shape != experts[0][name].shape for name, tensor in merged.items()):
            wide = export(resized_copy(model, merged_shapes(spec, maps), {}))
            self.program.adopt(self.program.arguments_in(wide))
        self.values = Values(
            self.program, experts, merged, self.batches, kept_bytes(config, calibration), calibration.device
        )
        self.rows = Rows(
            self.batches, Positions(), per_input=0, all_batches=len(batches), seed=0, device=calibration.device
        )
        sites = find_sites(self.program, cut.trunk, spec.head)
        self.sites = {node: site for node, site in sites.items() if self._is_layer(site)}

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """Walk to the last layer of the trunk."""
        last = max((self.program.position[node] for node in self.sites), default=-1)
        with self.values.store:
            for i, node in enumerate(self.program.nodes[: last + 1]):
                if node in self.sites:
                    self._solve(self.sites[node])
                self._compute(node)
                for used in {node, *node.all_input_nodes}:
                    if self.program.last_use.get(used, i) <= i:
                        self.values.forget(used)
        return {name: self.values.solved[name] for name in self.planned.cut.trunk}

    def _is_layer(self, site: RefitSite) -> bool:
        """Whether rules can be given what a site is fed: the kernel of one input channel reads no space."""
        weight = self.values.solved[site.weight]
        matrix = view_of(weight, self.combiner.trunk.labels(site.weight)) is not None
        known = site.kind in LAYERS and site.plain and not site.turned and weight.dim() in (1, 2, 4)
        return known and (matrix or weight.dim() == 1)

    def _compute(self, node: fx.Node) -> None:
        """Run one op of the merged model on all batches, and of every expert on those of its own task."""
        values = self.values
        for b, inputs in enumerate(values.inputs):
            for who in (MERGED, *self._experts_of(b)):
                values.store[node, who, b] = self.program.run(
                    node, lambda used, who=who, b=b: values.store[used, who, b], values.tensors[who], inputs,
                    who == MERGED,
                )  # fmt: skip

    def _experts_of(self, b: int) -> Iterator[int]:
        """Whose task's samples a batch may hold."""
        task = self.batches[b].task
        return iter(self.values.experts if task is None else (task,))

    def _solve(self, site: RefitSite) -> None:
        """Write what the rule makes of a layer's weight, then of its bias, into the merged model."""
        layer, merged = self._layer(site), self.values.merged
        merged[site.weight] = self.combiner.tensor(site.weight, layer).to(merged[site.weight])
        if site.bias is not None:
            solved = self._matrix(site.weight, self.values.solved[site.weight].double())
            merged[site.bias] = self.combiner.tensor(site.bias, layer.bias(solved)).to(merged[site.bias])

    def _matrix(self, name: str, tensor: Tensor) -> Tensor:
        """A layer's weight as a matrix `[out, in]`; a norm's scale as it is."""
        view = view_of(tensor, self.combiner.trunk.labels(name))
        return tensor if view is None else view.matrix(tensor)

    def _layer(self, site: RefitSite) -> Layer:
        """What the merged model and the experts feed into a layer, and the experts' weights."""
        count, trunk = len(self.values.experts), self.combiner.trunk
        sums: list[list[Tensor] | None] = [None] * count
        for b in range(len(self.batches)):
            x, weight = self._rows(site, MERGED, b)
            for t in self._experts_of(b):
                made = self._sums(site, x, self._rows(site, t, b)[0], weight)
                sums[t] = made if sums[t] is None else [a + c for a, c in zip(sums[t], made, strict=True)]
        size = self._matrix(site.weight, self.values.solved[site.weight]).shape[-1]
        square = (size,) if site.kind == "norm" else (size, size)
        shapes = (square, square, (size,), (size,), ())
        known = [own or [torch.zeros(shape, dtype=torch.float64) for shape in shapes] for own in sums]
        reduced = [[self.all_reduce(part) for part in own] for own in known]
        means = [[part / own[-1].clamp_min(1e-300) for part in own[:-1]] for own in reduced]
        moments = zip(*means, strict=True)
        weights = [self._matrix(site.weight, tensor) for tensor in trunk.moved(site.weight)[0]]
        return Layer(*map(list, moments), weights, trunk.moved(site.bias)[0] if site.bias else None)  # type: ignore[arg-type]

    def _sums(self, site: RefitSite, x: Tensor, z: Tensor, weight: Tensor) -> list[Tensor]:
        """Weighted sums over the rows of both models' inputs, and of the weights."""
        scaled = x * weight[:, None].to(x)
        if site.kind == "norm":
            moments = [(scaled.double() * other.double()).sum(0) for other in (x, z)]
        else:
            moments = [product_sum(scaled, other) for other in (x, z)]
        means = [scaled.double().sum(0), (z * weight[:, None].to(z)).double().sum(0)]
        return [part.cpu() for part in (*moments, *means, weight.double().sum())]

    def _rows(self, site: RefitSite, who: int, b: int) -> tuple[Tensor, Tensor]:
        """What a layer reads in one model, `[rows, in]` in merged units, and the rows' weights: 0 for padding."""
        node = site.node
        x = self.values.of(node.args[0], who, b)
        if site.kind == "norm":
            x = functional.layer_norm(x, x.shape[-1:], None, None, float(node.args[4]) if len(node.args) > 4 else 1e-5)
        label = all_held(self.planned.spec.axes[site.weight][0 if site.kind == "norm" else 1])
        if who != MERGED:
            x = own_features_to_merged(x, site.channel_axis, label, self.maps, self.planned.spec, who)
        weight = self.rows.weights(shape_of(site.output), b, site.channel_axis)
        if site.kind == "conv":
            return patches(x, self.values.merged[site.weight], node, slice(None)), weight
        return x.flatten(0, -2), weight
