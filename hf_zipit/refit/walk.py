"""The refit: walk the trunk in execution order and regress every module on what the experts' modules compute.

All calibration micro-batches advance together through the exported forward pass, of the experts and of the merged
model (`values.py`). At a module with weights

- the input x is what the *merged* model feeds into it, every earlier module already refitted;
- the target is the merged units' share of what the experts' same module puts out (`targets.py`);
- weights are solved by ridge regression (`regression.py`, `solvers.py`) towards the combined weights, and the walk
  goes on with them. Attention is solved as a whole (`attention_solver.py`).

Where a branch leaves the trunk, the maps to the experts' own units are solved as well (`solvers.py`). At last these
maps and the last layer are fitted to what the experts answer (`answer_refinement.py`).

Ours; relatives are PLeaS (arXiv 2407.02447) and RegMean++. Invariant: experts that compute the same (a model and
its permuted copy) are a fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count

import torch
from torch import Tensor, fx, nn
from transformers.utils.logging import tqdm

from hf_zipit.config import RefitConfig
from hf_zipit.data.calibration import MicroBatch
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.head_dims import HeadCut
from hf_zipit.planning.cut import Cut, tower_lengths
from hf_zipit.refit.answer_refinement import refine_answers
from hf_zipit.refit.attention import Attention, find_attention
from hf_zipit.refit.attention_solver import AttentionSolver
from hf_zipit.refit.ending import find_ending
from hf_zipit.refit.fit import Fit, Targets, relative_errors, rows_used
from hf_zipit.refit.head_biases import HeadBiases
from hf_zipit.refit.mixtures import find_mixtures, solve_hidden, solve_outputs
from hf_zipit.refit.mlp_solver import choose_units
from hf_zipit.refit.mlps import find_mlps
from hf_zipit.refit.normed_writers import with_branch_norms
from hf_zipit.refit.positions import Positions, Rows
from hf_zipit.refit.program import Program, merged_shapes, resized_copy
from hf_zipit.refit.report import RefitReport
from hf_zipit.refit.shared import KINDS as SHARED
from hf_zipit.refit.shared import solve_shared
from hf_zipit.refit.shared_refinement import recurring, refine_shared
from hf_zipit.refit.solvable import RefitSite, find_shared, find_sites, knows_its_units
from hf_zipit.refit.solvers import Readouts, find_readouts, norm_names, solve, solve_readout
from hf_zipit.refit.splitting import SplitHeads, find_splits
from hf_zipit.refit.values import MERGED, Values
from hf_zipit.symmetry.spec import MergeSpec


@dataclass(frozen=True)
class Refitted:
    """What the walk returns.

    Attributes:
        tensors: the trunk's new tensors.
        readouts: the maps from merged units to the experts' own; None where nothing was refitted.
        head_cuts: by path what attention layers have whose heads were split.
        reparametrised: weights whose outputs are no expert's units any more: queries, keys and values of attention
            layers that were solved as a whole, with the norms of queries and keys, and the first maps of MLPs whose
            units were chosen.
        report: the regression errors.
        maps: of the spaces that have other maps than the alignment's; see `stream_basis.py`.
        peak_bytes: the most memory that activations took.
    """

    tensors: dict[str, Tensor]
    readouts: Readouts | None = None
    head_cuts: dict[str, HeadCut] = field(default_factory=dict)
    reparametrised: frozenset[str] = frozenset()
    report: RefitReport | None = None
    maps: Alignment = field(default_factory=dict)
    peak_bytes: int = 0


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
        all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str = "cpu",
        budget: float = float("inf"),
    ) -> None:
        """See `stage.refit`; `all_reduce` sums a tensor over all processes, `fields` are the outputs that count, and
        `budget` what activations may take of the CPU's memory, in bytes.

        `model`, whose forward pass is traced, and the batches are on the CPU; all else happens on `device`.
        """
        self.cut, self.progress = cut, progress
        export = partial(Program, inputs=batches[0].inputs, fields=fields, trunk=cut.trunk, device=device)
        self.program = export(model)
        if any(tensor.shape != experts[0][name].shape for name, tensor in merged.items()):
            wide = export(resized_copy(model, merged_shapes(spec, alignment), {}))
            self.program.adopt(self.program.arguments_in(wide))
        sites = find_sites(self.program, cut.trunk, spec.head)
        self.sites = {node: site for node, site in sites.items() if knows_its_units(site, spec)}
        self.shared = [
            places
            for places in find_shared(self.program, cut.trunk, spec.head)
            if {site.kind for site in places} in SHARED and all(knows_its_units(site, spec) for site in places)
        ]
        mixtures = list(find_mixtures(self.program, self.sites))
        self.in_mixtures = {mixture.writer.node: (mixture, solve_hidden) for mixture in mixtures}
        self.in_mixtures |= {mixture.reader.node: (mixture, solve_outputs) for mixture in mixtures}
        self.sites = {n: site for n, site in self.sites.items() if site.kind != "routed" or n in self.in_mixtures}
        self.sites = with_branch_norms(self.program, self.sites)
        self.readouts = find_readouts(self.program, cut)
        self.attention = {
            layer.node: layer for layer in find_attention(self.program, self.sites, spec, alignment, self.shared)
        }
        self.in_attention = {site.node for layer in self.attention.values() for site in layer.sites}
        self.behind_attention = {layer.output.node for layer in self.attention.values()}
        mlps = list(find_mlps(self.program, self.sites, spec))
        self.mlps = {mlp.at: mlp for mlp in mlps if config.choose_units}
        self.in_mlp = {site.node for mlp in self.mlps.values() for site in mlp.writers}
        self.chosen: set[fx.Node] = set()
        self.ending = None
        if config.answer_steps and list(cut.blocks) == tower_lengths(spec):  # branches are heads, and cheap
            self.ending = find_ending(self.program, self.sites, mlps, self.readouts, model)
        self.read_at_the_end = set() if self.ending is None else self.ending.read
        self.splits: dict[Attention, SplitHeads] = {}
        if config.split_heads:
            layers, inputs = self.attention.values(), batches[0].inputs
            self.splits = find_splits(self.program, layers, model, inputs, fields, len(tasks), spec)
        self.head_cuts: dict[str, HeadCut] = {}
        self.scaled_anew, self.asked_anew = set[str](), set[str]()
        self.biases_split: dict[HeadBiases, bool] = {}

        values = Values(self.program, experts, merged, batches, budget, torch.device(device))
        rows = Rows(
            batches,
            positions,
            per_input=config.rows_per_input,
            all_batches=int(all_reduce(torch.tensor(float(len(batches))))),
            seed=seed,
            device=device,
        )
        targets = Targets(values, spec, alignment, config)
        self.fit = Fit(tuple(tasks), spec, alignment, config, values, rows, targets, all_reduce)
        self.errors: dict[str, dict[str, float]] = {}
        self.rows: dict[str, tuple[int, int]] = {}
        self.noted: dict[fx.Node, str] = {}  # by what name of the two
        self.ahead = 0
        self.read_of_experts = self._read_of_experts()

    @torch.no_grad()
    def run(self) -> Refitted:
        """Walk to the last node that the trunk or a readout needs."""
        values, position = self.fit.values, self.program.position
        reached = [self._aims_at(site) for site in self.sites.values()]
        reached += [position[site.output] for places in self.shared for site in places]
        reached += [position[node] for node in self.readouts.values()]
        solved_as_a_whole, expiring = self._in_attention_layers(), self._expiring()
        alone = [site for site in self.sites.values() if site.node not in self.in_attention]
        made_by = {site.output: site for site in alone if site.behind is None}  # else what the norm makes counts
        shared = {site.output: site for places in self.shared for site in places}
        made_by |= shared
        again = recurring(self.program, self.shared, self.sites.values())
        first_round = min((position[site.node] for places in again for site in places), default=-1)
        solved: Readouts = {}
        with values.store, self._bar() as bar:
            solve_shared(self.fit, self.shared)
            for i, node in enumerate(self.program.nodes[: max(reached, default=-1) + 1]):
                self._advance_experts(i)
                if i == first_round:
                    refine_shared(self.fit, again)
                site = self.sites.get(node) if node not in self.in_attention else None
                if site is not None:
                    self._advance_experts(self._aims_at(site))
                    if node in self.mlps:
                        self._choose_units(node)
                    elif node in self.in_mixtures:
                        mixture, solve_part = self.in_mixtures[node]
                        self._advance_experts(position[mixture.stream or mixture.reader.node])
                        solve_part(self.fit, mixture)
                    elif node not in self.behind_attention | self.in_mlp:
                        solve(self.fit, site)
                    for made in self.program.made_of_weights(node):
                        values.compute(made, MERGED)
                elif node in self.attention:
                    self._solve_attention(node)
                elif node in shared:
                    self._advance_experts(self._aims_at(shared[node]))
                if node not in solved_as_a_whole:
                    values.compute(node, MERGED)
                if site is not None and site.behind is not None:
                    self.fit.targets.forget(site)
                for entry, source in self.readouts.items():
                    if source is node:
                        found = solve_readout(self.fit, entry, node)
                        solved[entry] = [(weight.cpu(), bias.cpu()) for weight, bias in found]
                for made in self._made_by(node, made_by):
                    bar.set_postfix_str(f"{made.module}, error {self._note(made):.3f}", refresh=False)
                    bar.update()
                for expired in expiring.get(i, ()):
                    values.forget(expired)
            answers = refine_answers(self.fit, self.ending, solved) if self.ending is not None else None
            if answers is not None:
                solved = answers.readouts
                self.chosen |= {site.node for site in self.ending.sites}  # type: ignore[union-attr]
        tensors = {name: values.solved[self.program.tied.get(name, name)] for name in self.cut.trunk}
        reparametrised = {self.sites[node].weight for node in self.in_attention | self.chosen}
        reparametrised |= self.scaled_anew | self.asked_anew
        reparametrised |= {layer.value.site.weight for layer in self.attention.values()}
        off = {} if answers is None else answers.errors
        report = RefitReport(self.fit.tasks, self.errors, self._untouched(), self.rows, off)
        return Refitted(
            tensors, solved, self.head_cuts, frozenset(reparametrised), report, peak_bytes=values.store.peak
        )

    def _aims_at(self, site: RefitSite) -> int:
        """The position of what a site aims at; of a table, that of the op that reads it."""
        aim = site.aim
        return self.program.position.get(aim.stream or aim.output, self.program.position[site.node])

    def _solve_attention(self, node: fx.Node) -> None:
        layer = self.attention[node]
        self._advance_experts(self._aims_at(layer.output))
        split = self.splits.get(layer)
        biases = None if split is None else split.biases
        solver = AttentionSolver(self.fit, layer, split, biases and self.biases_split.get(biases))
        cut = solver.solve()
        if solver.asked_anew:
            self.asked_anew |= {own.site.weight for own in layer.asked}
            for node in layer.steps_apart & self.noted.keys():  # as they were solved apart
                name = self.noted.pop(node)
                del self.errors[name], self.rows[name]
        if solver.scaled_anew and layer.apart is not None:
            self.scaled_anew |= set(layer.apart.scales)
        if cut is not None and layer.module is not None:
            self.head_cuts[layer.module] = cut
        if biases is not None and biases not in self.biases_split:
            self.biases_split[biases] = cut is not None
            for site in self.sites.values():
                if cut is not None and site.weight in biases.tables and site.module in self.errors:
                    self.errors[site.module] = dict.fromkeys(self.errors[site.module], 0.0)  # each head has its own

    def _choose_units(self, node: fx.Node) -> None:
        mlp = self.mlps[node]
        self._advance_experts(self._aims_at(mlp.reader))
        if choose_units(self.fit, mlp):
            self.chosen |= {site.node for site in mlp.writers}

    def _advance_experts(self, upto: int) -> None:
        """The experts run ahead of the merged model where a target lies ahead: at the end of a residual branch.

        What nothing reads later is not kept: a branch's inner values would take several times the stream's memory.
        """
        if self.ahead > upto:
            return
        nodes = self.program.nodes[self.ahead : upto + 1]
        kept = {node for node in nodes if node in self.read_of_experts or self.program.last_use.get(node, -1) > upto}
        for expert in self.fit.values.experts:
            self.fit.values.advance(nodes, expert, kept)
        self.ahead = upto + 1

    def _read_of_experts(self) -> set[fx.Node]:
        """The nodes whose values of the experts are targets, or regressed on the merged model's."""
        single = [site for site in self.sites.values() if site.node not in self.in_attention]
        layers = self.attention.values()
        inputs = [x for layer in layers for own in (*layer.inputs, *layer.asked) for x in own.inputs]
        shared = [site for places in self.shared for site in places]
        targets = [site.stream or site.output for site in (*single, *shared)]
        return {
            *targets,
            *inputs,
            *self.readouts.values(),
            *self.read_at_the_end,
            *(mlp.input for mlp in self.mlps.values()),
            *(mixture.writer.node.args[0] for mixture, _ in self.in_mixtures.values()),
        }

    def _in_attention_layers(self) -> set[fx.Node]:
        """Ops of attention layers, up to the means, that whoever solves the layer runs as far as they are needed."""
        return {node for layer in self.attention.values() for node in layer.ops}

    def _expiring(self) -> dict[int, list[fx.Node]]:
        """By position the nodes whose values no op reads after it."""
        last = {node: self.program.last_use.get(node, i) for i, node in enumerate(self.program.nodes)}
        for layer in self.attention.values():
            steps = (*layer.ops, layer.value.site.node, *layer.steps_apart)
            # Weights that are made step by step are as many as pairs of positions, and made anew where they are read.
            made = layer.apart.steps - layer.ops if layer.apart is not None and layer.weights is not None else ()
            for node in (used for op in steps for used in (op, *op.all_input_nodes)):
                if node in last and node not in made:
                    last[node] = max(last[node], self.program.position[layer.node])
        for biases in {split.biases for split in self.splits.values() if split.biases is not None}:
            for node in biases.needed(self.program) & last.keys():
                last[node] = max(last[node], self.program.position[biases.layers[0].node])
        for mlp in self.mlps.values():
            for node in (mlp.input, *(site.node for site in mlp.writers)):
                if node in last:
                    last[node] = max(last[node], self.program.position[mlp.at])
        last |= dict.fromkeys(last.keys() & self.read_at_the_end, len(self.program.nodes))
        expiring: dict[int, list[fx.Node]] = {}
        for node, position in last.items():
            expiring.setdefault(position, []).append(node)
        return expiring

    def _made_by(self, node: fx.Node, made_by: Mapping[fx.Node, RefitSite]) -> Sequence[RefitSite]:
        """The sites whose solutions have run when a node has; none of an MLP whose units were chosen."""
        if node in self.in_mlp:
            return self.mlps[node].writers if node in self.mlps and node not in self.chosen else ()
        return (made_by[node],) if node in made_by else ()

    def _note(self, site: RefitSite) -> float:
        """Keep a site's relative error on every task's samples for the report; returns their mean."""
        found = relative_errors(self.fit, site)
        self.fit.targets.forget(site)
        names = chain((site.module, site.weight), (f"{site.module} at place {n}" for n in count(2)))
        name = next(name for name in names if name not in self.errors)
        self.errors[name], self.rows[name] = found, rows_used(self.fit, site)
        self.noted[site.node] = name
        return sum(found.values()) / max(len(found), 1)

    def _untouched(self) -> tuple[str, ...]:
        """Tensors of the trunk that have no site and keep their combined values."""
        solved = set(self.scaled_anew)
        for site in (*self.sites.values(), *(site for places in self.shared for site in places)):
            solved |= {site.weight, site.bias, site.length, *norm_names(self.fit, site).values()}
            solved.add(self.program.tensor_of(site.scale))  # what is solved is the product
        solved |= {name for name, other in self.program.tied.items() if other in solved}
        read = self.cut.trunk & self.fit.spec.axes.keys() - solved
        return tuple(sorted(name for name in read if self.fit.values.solved[name].is_floating_point()))

    def _bar(self) -> tqdm:
        return tqdm(
            total=sum(site.behind is None for site in self.sites.values()) - len(self.in_attention),
            desc="refit",
            unit="module",
            disable=not self.progress,
            leave=False,
        )
