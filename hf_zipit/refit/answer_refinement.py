"""The end of the refit: the last layer and the maps out of the trunk are fitted to what the experts answer.

Up to here everything was solved for features. But not every error in them reaches an answer: what a distribution over
tokens depends on is not what varies most. What comes last can be solved for the answers themselves,

    min  sum_i w_i D( expert t's answer to i, head_t( U_t z(x_i) ) ),    i of task t,

over the last MLP before the trunk's end, the norms behind it, and the maps U_t from merged units to expert t's own;
the heads are the experts'. x is what the merged model feeds into the layer, and is known; D is the Kullback-Leibler
divergence (`answers.py`), as a share of what a constant answer is off by. Some steps of Adam (Kingma and Ba, arXiv
1412.6980), in coordinates in which the layer's inputs are white, do most of it. Some of the samples are held out: the
steps stop where they no longer help there, and the best weights on them are kept, which may be the first ones.

No model is run or differentiated but this layer and the heads. Steps go through the samples of one task after the
other, so many at a time, whatever the size of micro-batches and wherever they are.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from hf_zipit.planning.cut import ReadPoint
from hf_zipit.refit.answers import classes_last, divergence, kind_of, spread_of, statistics
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.mlps import Mlp
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.solvers import Readouts
from hf_zipit.refit.unit_refinement import HELD_OUT, whitening
from hf_zipit.refit.values import MERGED

AT_ONCE = 64
"""Samples that a step sees."""

RATE = 0.15
"""The longest step of Adam, in units of what is typical of the weights, and of the square root of the error: a change
of all weights by a share of themselves is worth about the square of it."""

SHORTER = 0.3
"""Steps become shorter by this where they did not help,"""

SHORTEST = 0.05
"""and end where they would be shorter than this."""

EVERY = 16
"""After so many steps the samples that are held out are looked at."""

PASSES = 4
"""So often, at most, steps go through all samples, if that is more than `EVERY` steps: they are as dear as heads."""

RIGHT = 0.003
"""Answers that are off by less than this share of what a constant one is off by are right."""

BETWEEN_SAMPLES = "logits_per_"
"""How the classes of `transformers` name similarities of samples to each other, which are no sample's answer."""

NUMBERS = 2**25
"""More answers than this in a micro-batch are not fitted: there is no room for their gradients."""


@dataclass(frozen=True)
class Ending:
    """What comes last in a forward pass.

    Attributes:
        nodes: the ops of the trunk from the last MLPs on, in the order they run.
        sites: those of them whose weights are fitted.
        readouts: by entry the node that branches read.
        heads: the ops of the branches, in the order they run.
        answers: by output field the node that makes it, and what it holds.
    """

    nodes: tuple[fx.Node, ...]
    sites: tuple[RefitSite, ...]
    readouts: Mapping[ReadPoint, fx.Node]
    heads: tuple[fx.Node, ...]
    answers: Mapping[str, tuple[fx.Node, str]]

    @property
    def read(self) -> set[fx.Node]:
        """The values from before that are needed, and those of the experts that branches read."""
        used = {x for node in (*self.nodes, *self.heads) for x in node.all_input_nodes}
        return used.difference(self.nodes, self.heads).union(self.readouts.values())


def find_ending(
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    mlps: Sequence[Mlp],
    readouts: Mapping[ReadPoint, fx.Node],
    model: nn.Module,
) -> Ending | None:
    """Where answers can be fitted; None where there are no choices among classes, or too many numbers.

    Of the MLPs those are last behind which norms and nothing else with weights of the trunk come.
    """
    behind = program.behind(readouts.values())
    fields = {name: node for name, node in program.outputs.items() if not name.startswith(BETWEEN_SAMPLES)}
    made = {name: node for name, node in fields.items() if node in behind}
    made = {name: node for name, node in made.items() if node.meta["val"].is_floating_point()}
    answers = {name: (node, kind_of(name, node.meta["val"], model)) for name, node in made.items()}
    if {kind for _, kind in answers.values()} <= {"values"}:
        return None
    if sum(node.meta["val"].numel() for node in made.values()) > NUMBERS:
        return None
    needed, reached = _before(made.values()), _before(readouts.values())
    end = max(program.position[node] for node in readouts.values())
    nodes = set[fx.Node]()
    for mlp in mlps:
        own = {site.node for site in mlp.writers}
        found = (own | program.behind(own)) & reached
        others = {sites[node].kind for node in found & sites.keys() - own - {mlp.reader.node}}
        if others <= {"norm", "gain"} and found.isdisjoint(behind):
            nodes |= found
    fitted = [sites[node] for node in program.nodes if node in nodes and node in sites]
    return Ending(
        tuple(node for node in program.nodes if node in nodes),
        tuple(site for site in fitted if site.length is None),
        readouts,
        tuple(node for node in program.nodes if node in needed and (node in behind or program.position[node] > end)),
        answers,
    )


def _before(end: Collection[fx.Node]) -> set[fx.Node]:
    """Some nodes, and what they depend on."""
    found, todo = set[fx.Node](), list(end)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


@dataclass(frozen=True)
class FittedAnswers:
    """The maps out of the trunk, and by task how far answers to samples that were held out were off, and are now."""

    readouts: Readouts
    errors: Mapping[str, tuple[float, float]]


@torch.enable_grad()
def refine_answers(fit: Fit, ending: Ending, readouts: Readouts) -> FittedAnswers | None:
    """Write better weights of the last layer into the merged model.

    Returns:
        The maps out of the trunk that go with them; None where there are no better ones.
    """
    answers = AnswerErrors(fit, ending)
    layer = LastLayer(fit, ending, readouts)
    steps, step = min(fit.config.answer_steps, max(EVERY, PASSES * len(answers.windows))), 0
    first = best = answers.held_out(layer)
    if not float(first.mean()) > RIGHT:
        return None
    layer.whiten()
    shorter, optimizer, found = 1.0, None, None
    while step < steps and float(best.mean()) > RIGHT and shorter > SHORTEST:
        if optimizer is None:
            optimizer = torch.optim.Adam(layer.groups(float(best.mean()) ** 0.5 * shorter), betas=(0.9, 0.99))
            lengths = [group["lr"] for group in optimizer.param_groups]
        for group, length in zip(optimizer.param_groups, lengths, strict=True):
            group["lr"] = length * (1 + math.cos(math.pi * step / steps)) / 2
        layer.clear()
        answers.backward(layer, step)
        for parameter in layer.parameters:
            parameter.grad = fit.all_reduce(parameter.grad)
        layer.penalty().backward()
        optimizer.step()
        step += 1
        if step % EVERY == 0 or step == steps:
            now = answers.held_out(layer)
            if float(now.mean()) < float(best.mean()):
                best, found = now, layer.weights()
                layer.keep()
            else:  # the steps were too long
                layer.restore()
                shorter, optimizer = shorter * SHORTER, None
    if found is None:
        return None
    tensors, better = found
    for name, tensor in tensors.items():
        fit.values.merged[name] = tensor
    errors = {task: (float(a), float(b)) for task, a, b in zip(fit.tasks, first, best, strict=True)}
    return FittedAnswers(better, errors)


class LastLayer:
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
        typical = {
            name: _typical(self.own[site.weight]) for site in self.ending.sites for name in (site.weight, site.bias)
        }
        self.parameters = list(self.own.values())
        self.typical = [typical[name] for name in self.own]
        for pair in (pair for maps in self.readouts.values() for pair in maps):
            self.parameters += pair
            self.typical += [_typical(pair[0])] * 2
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.keep()
        self.start = self.kept

    @torch.no_grad()
    def _whitenings(self) -> dict[fx.Node | ReadPoint, tuple[Tensor, Tensor]]:
        """By linear map's input, and by entry, what makes it white, of one variance, and back again."""
        values = self.fit.values
        linear = dict.fromkeys(site.node.args[0] for site in self.ending.sites if site.kind == "linear")  # in order
        places: list[tuple[fx.Node | ReadPoint, fx.Node, int]] = [(node, node, -1) for node in linear]  # type: ignore[misc]
        places += [(entry, self.ending.readouts[entry], entry.axis) for entry in self.readouts]
        found: dict[fx.Node | ReadPoint, list[tuple[Tensor, Tensor]]] = {}
        for b in range(len(values.batches)):
            known = self._trunk(b, values.merged)
            for key, node, axis in places:
                value = (known[node] if node in known else values.of(node, MERGED, b)).movedim(axis, -1)
                rows, weights = self.fit.rows.pick(value.shape, b, -1, value.shape[-1])
                found.setdefault(key, []).append((value.flatten(0, -2)[rows], weights))
        made = {}
        for key, parts in found.items():
            x, weight = (torch.cat(part) for part in zip(*parts, strict=True))
            there, back, _ = whitening(self.fit, x, weight)
            square, count = self.fit.all_reduce(torch.stack([(x @ there.mT).square().sum(), x.new_tensor(x.numel())]))
            size = (square / count).sqrt().clamp_min(1e-12)
            made[key] = there / size, back * size
        return made

    def groups(self, length: float) -> list[dict[str, Any]]:
        """The parameters, each with the length of its steps."""
        pairs = zip(self.parameters, self.typical, strict=True)
        return [{"params": [parameter], "lr": RATE * length * typical} for parameter, typical in pairs]

    def keep(self) -> None:
        """Remember the parameters for `restore`."""
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to where the parameters were kept."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)

    def clear(self) -> None:
        """Forget the gradients; samples may be none, of which there are none."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def penalty(self) -> Tensor:
        """The ridge of the weights, towards those that they started from."""
        off = [
            (parameter - start).square().sum() / start.square().sum().clamp_min(1e-12)
            for parameter, start in zip(self.parameters, self.start, strict=True)
            if parameter.dim() > 1
        ]
        return self.fit.config.ridge * torch.stack(off).sum()

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

    def weights(self) -> tuple[dict[str, Tensor], Readouts]:
        """The same, of the present."""
        with torch.no_grad():
            tensors, maps = self._now()
            kept = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            return kept, {entry: [(w.cpu().clone(), b.cpu().clone()) for w, b in own] for entry, own in maps.items()}

    def _trunk(self, b: int, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """The values of the trunk's last ops."""
        values, known = self.fit.values, dict[fx.Node, Tensor]()
        for node in self.ending.nodes:
            known[node] = values.program.run(
                node, lambda x: known[x] if x in known else values.of(x, MERGED, b), tensors, values.inputs[b], True
            )
        return known

    def read(self, b: int, tasks: Sequence[int]) -> Iterator[dict[fx.Node, Tensor]]:
        """What the branch of every task reads, in its expert's own units."""
        values = self.fit.values
        tensors, maps = self._now()
        known = self._trunk(b, ChainMap(tensors, values.merged))  # type: ignore[arg-type]
        for t in tasks:
            given = {}
            for entry, node in self.ending.readouts.items():
                value = (known[node] if node in known else values.of(node, MERGED, b)).movedim(entry.axis, -1)
                given[node] = functional.linear(value, *maps[entry][t]).movedim(-1, entry.axis)
            yield given


def _typical(weight: Tensor) -> float:
    """Of the numbers of a weight whose inputs are white; what is added to its outputs is as large."""
    return float(weight.detach().square().mean().sqrt().clamp_min(1e-6))


@dataclass(frozen=True)
class Size:
    """Of one field of a task's answers: the weight of the rows that are fitted, and of those that are held out; and
    what a constant answer is off by.
    """

    fitted: float
    held: float
    spread: float


class AnswerErrors:
    """What the experts answer to samples of their own tasks, and how far a last layer is from that."""

    def __init__(self, fit: Fit, ending: Ending) -> None:
        self.fit, self.ending, self.values = fit, ending, fit.values
        counts = torch.zeros(len(fit.tasks) + 1, device=fit.values.device)
        for batch in self.values.batches:
            counts[self._kind(batch.task)] += batch.real
        counted = enumerate(fit.all_reduce(counts).tolist())
        found = ((kind, first) for kind, count in counted for first in range(0, int(count), AT_ONCE))
        self.windows = sorted(found, key=lambda window: window[::-1])  # the tasks take turns
        with torch.no_grad():
            self.sizes = self._sizes()

    def held_out(self, layer: LastLayer) -> Tensor:
        """By task how far answers to samples that are held out are off, as a share of what a constant is off by."""
        total = self.fit.zeros(len(self.fit.tasks))
        with torch.no_grad():
            for b in range(len(self.values.batches)):
                held = self._is_held(b)
                if bool(held.any()):
                    for t, name, off in self._off(layer, b, held):
                        total[t] += off.to(total) / self._whole(t, name, self.sizes[t, name].held)
        return self.fit.all_reduce(total)

    def backward(self, layer: LastLayer, step: int) -> None:
        """Add up the gradients of this process's samples in a step."""
        kind, first = self.windows[step % len(self.windows)]
        for b, batch in enumerate(self.values.batches):
            if self._kind(batch.task) == kind and batch.first < first + AT_ONCE and first < batch.first + batch.real:
                number = self._numbers(b)
                seen = (number >= first) & (number < first + AT_ONCE) & ~self._is_held(b)
                share = 1 / sum(window[0] == kind for window in self.windows)
                errors = [
                    off / self._whole(t, name, share * self.sizes[t, name].fitted)
                    for t, name, off in self._off(layer, b, seen)
                ]
                torch.stack(errors).sum().backward()

    def _whole(self, t: int, name: str, weight: float) -> float:
        """What a sum of errors is divided by: every field of a task counts alike."""
        return max(weight * self.sizes[t, name].spread, 1e-12) * len(self.ending.answers)

    def _off(self, layer: LastLayer, b: int, samples: Tensor) -> Iterator[tuple[int, str, Tensor]]:
        """By task and field the weighted sum of what answers to some samples are off by."""
        tasks = self._tasks(b)
        for t, given in zip(tasks, layer.read(b, tasks), strict=True):
            wanted = self._expert(t, b)
            for name, found in self._run(t, b, given).items():
                off = divergence(found, wanted[name], self.ending.answers[name][1])
                yield t, name, (off * self._weights(found, b, samples)).sum()

    def _expert(self, t: int, b: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._run(t, b, {node: self.values.of(node, t, b) for node in self.ending.readouts.values()})

    def _run(self, t: int, b: int, given: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
        """What expert t's branch makes of the values that it reads."""
        values, known = self.values, dict(given)
        for node in self.ending.heads:
            known[node] = values.program.run(
                node, lambda x: known[x] if x in known else values.of(x, t, b), values.tensors[t], values.inputs[b]
            )
        return {name: classes_last(known[node].float()) for name, (node, _) in self.ending.answers.items()}

    def _sizes(self) -> dict[tuple[int, str], Size]:
        """By task and field of its answers; one pass over all samples of the experts' heads."""
        kinds = {name: kind for name, (_, kind) in self.ending.answers.items()}
        sums: dict[tuple[int, str], Tensor] = {}
        for b in range(len(self.values.batches)):
            held = self._is_held(b)
            for t in self._tasks(b):
                for name, y in self._expert(t, b).items():
                    middle, own = statistics(y, kinds[name])
                    fitted, apart = (self._weights(y, b, some) for some in (~held, held))
                    weight = fitted + apart
                    found = torch.stack([fitted.sum(), apart.sum(), (weight * own).sum()])
                    likely = (middle * weight[..., None]).flatten(0, -2).sum(0)
                    own = torch.cat([found, likely]).to(self.fit.home, torch.float64)
                    sums[t, name] = own + sums[t, name] if (t, name) in sums else own
        sizes = {}
        for key in ((t, name) for t in self.values.experts for name in kinds):
            length = self.fit.zeros(2)  # a process may have no samples of a task, whose classes are its own
            if key in sums:
                length += torch.tensor([len(sums[key]), 1]).to(length)
            total, count = self.fit.all_reduce(length).tolist()
            fitted, apart, inside, *_ = found = self.fit.all_reduce(
                sums.get(key, self.fit.zeros(int(total / max(count, 1)) or 4))
            )
            weight = (fitted + apart).clamp_min(1e-12)
            spread = spread_of(found[3:] / weight, inside / weight, kinds[key[1]])
            sizes[key] = Size(float(fitted), float(apart), max(float(spread), 1e-6))
        return sizes

    def _weights(self, answers: Tensor, b: int, samples: Tensor) -> Tensor:
        """What every answer of some samples counts, in the shape of answers without their classes."""
        weights = self.fit.rows.weights(answers.shape, b, -1).reshape(answers.shape[:-1])
        return weights * samples.reshape(-1, *(1 for _ in answers.shape[1:-1]))

    def _numbers(self, b: int) -> Tensor:
        """The samples' numbers among those of their task."""
        batch = self.values.batches[b]
        return batch.first + torch.arange(batch.size, device=self.values.device)

    def _is_held(self, b: int) -> Tensor:
        return self._numbers(b) % HELD_OUT == HELD_OUT - 1

    def _kind(self, task: int | None) -> int:
        """The number of a task; the last one for samples of unknown tasks."""
        return len(self.fit.tasks) if task is None else task

    def _tasks(self, b: int) -> list[int]:
        task = self.values.batches[b].task
        return list(self.values.experts) if task is None else [task]
