"""Layers that run again and again, such as ALBERT's one, are fitted as they run.

Solved for what they should read (`shared.py`), they read what they put out themselves: whatever a first round leaves
grows from round to round. So all their weights are fitted together, through all rounds, to what the experts' streams
are after each,

    min  sum_l sum_i w_i || x_l(i) - y_l(i) ||^2 / spread(y_l),

with x_l the merged model's stream behind the l-th writer, made of the rounds before, and y_l the share of the experts'
there. Steps of Adam (`steps.py`), in coordinates in which the inputs of linear maps are white. What is between two
streams is computed once more on the way back: no more than that is in memory at once, however many rounds there are.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from hf_zipit.refit.fit import Fit, normed_next
from hf_zipit.refit.merged_attention import EVERYTHING
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.steps import (
    Spread,
    Squares,
    WhiteLayer,
    Windows,
    by_row,
    looked_at,
    take_steps,
    typical_size,
    whitening_of,
)
from hf_zipit.refit.stream_basis import values_of
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.ops import shape_of

EVERY = 16
"""After so many steps the samples that are held out are looked at; fewer steps are of no use."""

PASSES = 16
"""So often, at most, steps go through all samples: all rounds have no more weights than one layer elsewhere."""

RIGHT = 0.002
"""Nothing is fitted where no more than this share of the streams' variance is off."""

Places = tuple[RefitSite, ...]


def recurring(program: Program, groups: Sequence[Places], alone: Iterable[RefitSite]) -> list[Places]:
    """Of tensors that are used at several places those of layers that run again: what they write into a stream, they
    read in a later round.

    None where between their rounds there is something that the walk has yet to solve, of the sites that are `alone`.
    """
    maps = [places for places in groups if places[0].kind in ("linear", "norm")]
    writers = [places for places in maps if places[0].kind == "linear" and all(site.stream for site in places)]
    if not any(places[-1].node in program.behind([places[0].stream]) for places in writers):  # type: ignore[list-item]
        return []
    streams = {site.stream for places in writers for site in places if site.stream is not None}
    end = program.before(streams)

    def inside(site: RefitSite) -> bool:
        return site.node in end or (site.kind == "norm" and site.node.args[0] in streams)

    found = [places for places in maps if all(map(inside, places))]
    rounds = program.behind(site.node for places in found for site in places) & end
    return [] if any(site.node in rounds for site in alone) else found


def rounds_of(program: Program, groups: Sequence[Places]) -> list[fx.Node]:
    """The ops from the first of the places to the last stream that they write into, in the order they run."""
    start = {site.node for places in groups for site in places}
    needed = program.before([site.stream for places in groups for site in places if site.stream is not None])
    inside = start | program.behind(start)
    return [node for node in program.nodes if node in needed and node in inside]


def between(nodes: Sequence[fx.Node], streams: Container[fx.Node | None]) -> list[tuple[list[fx.Node], list[fx.Node]]]:
    """Ops in a row, cut behind every stream; with each part those of its ops that later parts read, and its stream."""
    parts: list[list[fx.Node]] = [[]]
    for node in nodes:
        parts[-1].append(node)
        if node in streams:
            parts.append([])
    inside = set(nodes)
    found = []
    for part in filter(None, parts):
        own = set(part)
        found.append(
            (part, [node for node in part if node in streams or not own.issuperset(inside & set(node.users))])
        )
    return found


def refine_shared(fit: Fit, groups: Sequence[Places]) -> None:
    """Write better weights of layers that run again into the merged model, if there are any.

    Args:
        groups: what `recurring` found; all that is computed before the first of their places is there.
    """
    windows = Windows(fit)
    steps = min(fit.config.shared_steps, PASSES * len(windows))
    if steps < EVERY:
        return
    layer = Rounds(fit, groups)
    errors = RoundErrors(fit, layer.aims, windows)
    first = errors.held_out(layer)
    found = take_steps(fit, layer, errors, first=first, steps=steps, every=EVERY, right=RIGHT)
    for site in layer.aims:
        fit.targets.forget(site)
    if found is not None:
        fit.values.merged.update(found[0])


class Rounds(WhiteLayer[dict[str, Tensor]]):
    """The streams behind every writer as a function of the weights that all rounds share.

    Attributes:
        aims: the writers.
    """

    @torch.no_grad()
    def __init__(self, fit: Fit, groups: Sequence[Places]) -> None:
        self.fit = fit
        writers = {site.stream: site for group in groups for site in group if site.stream is not None}
        self.aims = list(writers.values())
        nodes = rounds_of(fit.values.program, groups)
        self.inside, self.parts = set(nodes), between(nodes, writers)
        self.own = {n: fit.values.merged[n].float().clone() for g in groups for n in (g[0].weight, g[0].bias) if n}
        self.turned = {group[0].weight: group[0].turned for group in groups if group[0].kind == "linear"}
        self.white = self._whitenings(groups)
        for name, (_, back) in self.white.items():
            self.own[name] = (self.own[name].mT if self.turned[name] else self.own[name]) @ back
        sizes = {g[0].weight: typical_size(self.own[g[0].weight]) for g in groups}
        of = {name: g[0].weight for g in groups for name in (g[0].weight, g[0].bias) if name}
        self.set_parameters(list(self.own.values()), [sizes[of[name]] for name in self.own])

    def __call__(self, b: int) -> Iterator[tuple[RefitSite, Tensor]]:
        """The streams of a micro-batch."""
        tensors = ChainMap(self._now(), self.fit.values.merged)  # type: ignore[arg-type]
        known, aims = dict[fx.Node, Tensor](), {site.stream: site for site in self.aims}
        for nodes, read_later in self.parts:
            for used in (used for node in nodes for used in node.all_input_nodes if used.op == "call_function"):
                if used not in known and used not in self.inside:
                    known[used] = self.fit.values.peek(used, b, {})
            run = partial(self._run, nodes, read_later, dict(known), b, tensors)
            known |= zip(read_later, checkpoint(run, use_reentrant=False, preserve_rng_state=False), strict=True)
            yield from ((aims[node], known[node]) for node in read_later if node in aims)

    def _run(self, nodes: Sequence[fx.Node], ends: Sequence[fx.Node], known: dict, b: int, tensors: ChainMap) -> tuple:
        found = self.fit.values.follow(nodes, known, MERGED, b, tensors)
        return tuple(found[node] for node in ends)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        tensors = dict(self.own)
        for name, (there, _) in self.white.items():
            weight = tensors[name] @ there
            tensors[name] = weight.mT if self.turned[name] else weight
        return tensors

    def _whitenings(self, groups: Sequence[Places]) -> dict[str, tuple[Tensor, Tensor]]:
        """By linear map what makes its inputs white, those of all places together, and back again."""
        fit, values = self.fit, self.fit.values
        linear = [group for group in groups if group[0].weight in self.turned]
        read = {group[0].weight: tuple(site.node.args[0] for site in group) for group in linear}
        squares = {sources: Squares(fit) for sources in read.values()}

        def add(node: fx.Node, x: Tensor, b: int) -> None:
            for own in (own for sources, own in squares.items() if node in sources):
                rows, weight = fit.rows.pick(x.shape, b, -1, x.shape[-1])
                own.add(at_rows(x, -1, rows), weight.to(x))

        wanted = dict.fromkeys(source for sources in squares for source in sources)  # in one order
        for b in range(len(values.batches)):
            known: dict[fx.Node, Tensor] = {}
            for source in (source for source in wanted if source not in self.inside):
                add(source, values.of(source, MERGED, b), b)
            for nodes, read_later in self.parts:
                found = values.follow(nodes, known, MERGED, b)
                for source in (node for node in nodes if node in wanted):
                    add(source, found[source], b)
                known |= {node: found[node] for node in read_later}
        white = {own: whitening_of(fit, sums.mean(), next(iter(self.own.values()))) for own, sums in squares.items()}
        return {weight: white[sources] for weight, sources in read.items()}


class RoundErrors:
    """How far the streams are from the experts', as shares of how these vary, on average over the writers."""

    @torch.no_grad()
    def __init__(self, fit: Fit, aims: Sequence[RefitSite], windows: Windows) -> None:
        self.fit, self.windows = fit, windows
        by_stream = {site.stream: site for site in aims}
        self.looked_at = looked_at(fit)
        fitted, held = ({site: Spread(fit, fit.outputs(site)) for site in aims} for _ in range(2))
        for b, inputs in enumerate(fit.values.inputs):
            for node, *found in values_of(by_stream.keys(), fit.values.program, fit.values.tensors[:-1], inputs):
                site = by_stream[node]
                label = fit.targets.label(site)
                y = fit.targets.share_of(found, site.target_axis, label, b, EVERYTHING, normed_next(node))
                fit.targets.know(site, b, EVERYTHING, y)
                apart, weight = self._weights(site, b, len(y))
                fitted[site].add(y, weight * ~apart)
                if b in self.looked_at:
                    held[site].add(y, weight * apart)
        self.fitted, self.held = ({site: max(x.total(), 1e-30) for site, x in own.items()} for own in (fitted, held))

    def held_out(self, layer: Rounds) -> Tensor:
        total = self.fit.zeros(1)
        with torch.no_grad():
            for b in self.looked_at:
                for site, off in self._off(layer, b):
                    apart, weight = self._weights(site, b, len(off))
                    total += ((weight * apart) @ off).to(total) / (self.held[site] * len(layer.aims))
        return self.fit.all_reduce(total)

    def backward(self, layer: Rounds, step: int) -> None:
        for b, seen in self.windows.seen(step):
            errors = []
            for site, off in self._off(layer, b):
                _, weight = self._weights(site, b, len(off))
                share = len(self.windows) / (self.fitted[site] * len(layer.aims))
                errors.append((weight * by_row(seen, len(off))) @ off * share)
            torch.stack(errors).sum().backward()

    def _off(self, layer: Rounds, b: int) -> Iterator[tuple[RefitSite, Tensor]]:
        for site, stream in layer(b):
            y = self.fit.targets.reached(site, b, EVERYTHING)
            yield site, (stream.movedim(site.target_axis, -1).flatten(0, -2) - y).square().sum(1)

    def _weights(self, site: RefitSite, b: int, rows: int) -> tuple[Tensor, Tensor]:
        """Which rows of a micro-batch are held out, and what each counts."""
        shape = shape_of(site.stream)  # type: ignore[arg-type]
        weight = self.fit.rows.weights(shape, b, site.target_axis)
        return by_row(self.windows.held(b), rows), weight
