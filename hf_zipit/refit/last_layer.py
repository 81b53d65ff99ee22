"""The last layer of the merged model, and the maps out of its trunk, as a function of their weights."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.planning.cut import ReadPoint
from hf_zipit.refit.ending import Ending
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.solvers import Readouts
from hf_zipit.refit.steps import WhiteLayer, typical_size, whitening
from hf_zipit.refit.values import MERGED

LastWeights = tuple[dict[str, Tensor], Readouts]
"""The last layer's tensors by name, and the maps out of the trunk."""


class LastLayer(WhiteLayer[LastWeights]):
    """The end of the merged model as a function of its weights: linear maps see inputs that are white."""

    def __init__(self, fit: Fit, ending: Ending, readouts: Readouts) -> None:
        self.fit, self.ending = fit, ending
        values = fit.values
        names = [name for site in ending.sites for name in (site.weight, site.bias) if name]
        self.own = {name: values.merged[name].float().clone() for name in names}
        self.readouts = {
            entry: [tuple(x.to(values.device, torch.float32) for x in own) for own in maps]
            for entry, maps in readouts.items()
        }
        self.white: dict[fx.Node | ReadPoint, tuple[Tensor, Tensor]] = {}
        self.turned: dict[str, tuple[Tensor, bool]] = {}

    def whiten(self) -> None:
        """Have parameters, in coordinates in which the inputs of linear maps are white; the function stays."""
        self.white = self._whitenings()
        for site in self.ending.sites:
            if site.kind == "linear" and site.weight not in self.turned:
                there, back = self.white[site.node.args[0]]  # type: ignore[index]
                weight = self.own[site.weight]
                self.own[site.weight] = (weight.mT if site.turned else weight) @ back
                self.turned[site.weight] = there, site.turned
        self.readouts = {
            entry: [(weight @ self.white[entry][1], bias.clone()) for weight, bias in maps]
            for entry, maps in self.readouts.items()
        }
        names = [(name, site) for site in self.ending.sites for name in (site.weight, site.bias) if name]
        own = {name: typical_size(self.own[site.weight]) for name, site in names}
        pairs = [pair for maps in self.readouts.values() for pair in maps]
        parameters = [*self.own.values(), *(part for pair in pairs for part in pair)]
        typical = [*(own[name] for name in self.own), *(typical_size(pair[0]) for pair in pairs for _ in pair)]
        self.set_parameters(parameters, typical)

    @torch.no_grad()
    def _whitenings(self) -> dict[fx.Node | ReadPoint, tuple[Tensor, Tensor]]:
        """By linear map's input, and by entry, what makes it white, of one variance, and back again."""
        values = self.fit.values
        linear = dict.fromkeys(
            site.node.args[0] for site in self.ending.sites if site.kind == "linear"
        )  # in one order
        places: list[tuple[fx.Node | ReadPoint, fx.Node, int]] = [(node, node, -1) for node in linear]  # type: ignore[misc]
        places += [(entry, self.ending.readouts[entry], entry.axis) for entry in self.readouts]
        found: dict[fx.Node | ReadPoint, list[tuple[Tensor, Tensor]]] = {}
        for b in range(len(values.batches)):
            known = self._trunk(b, values.merged)
            for key, node, axis in places:
                value = (known[node] if node in known else values.of(node, MERGED, b)).movedim(axis, -1)
                rows, weights = self.fit.rows.pick(value.shape, b, -1, value.shape[-1])
                found.setdefault(key, []).append((value.flatten(0, -2)[rows], weights))
        return {key: whitening(self.fit, parts) for key, parts in found.items()}

    def _now(self) -> tuple[dict[str, Tensor], dict[ReadPoint, list[tuple[Tensor, Tensor]]]]:
        """The tensors and the maps out of the trunk, as the model has them."""
        tensors = dict(self.own)
        for name, (there, turned) in self.turned.items():
            weight = tensors[name] @ there
            tensors[name] = weight.mT if turned else weight
        maps = {
            entry: [(weight @ self.white[entry][0] if self.white else weight, bias) for weight, bias in own]
            for entry, own in self.readouts.items()
        }
        return tensors, maps

    @torch.no_grad()
    def weights(self) -> LastWeights:
        tensors, maps = self._now()
        kept = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        return kept, {entry: [(w.cpu().clone(), b.cpu().clone()) for w, b in own] for entry, own in maps.items()}

    def _trunk(self, b: int, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """The values of the trunk's last ops."""
        return self.fit.values.follow(self.ending.nodes, {}, MERGED, b, tensors)

    def read(self, b: int, tasks: Sequence[int], rows: Tensor | None) -> Iterator[dict[fx.Node, Tensor]]:
        """What the branch of every task reads, in its expert's own units; `rows` of it, or as it is."""
        values = self.fit.values
        tensors, maps = self._now()
        known = self._trunk(b, ChainMap(tensors, values.merged))  # type: ignore[arg-type]
        for t in tasks:
            given = {}
            for entry, node in self.ending.readouts.items():
                value = known[node] if node in known else values.of(node, MERGED, b)
                axis, value = (entry.axis, value) if rows is None else (-1, at_rows(value, entry.axis, rows))
                given[node] = functional.linear(value.movedim(axis, -1), *maps[entry][t]).movedim(-1, axis)
            yield given
