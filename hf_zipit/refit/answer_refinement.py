"""The end of the refit: the last layer and the maps out of the trunk are fitted to what the experts answer.

Up to here everything was solved for features. But not every error in them reaches an answer: what a distribution over
tokens depends on is not what varies most. What comes last can be solved for the answers themselves,

    min  sum_i w_i D( expert t's answer to i, head_t( U_t z(x_i) ) ),    i of task t,

over the last MLP before the trunk's end, the norms behind it, and the maps U_t from merged units to expert t's own;
the heads are the experts'. x is what the merged model feeds into the layer, and is known; D is the Kullback-Leibler
divergence (`answers.py`), as a share of what a constant answer is off by. Some steps of Adam do most of it
(`steps.py`).

Of heads that make an answer of every row, such as one over a vocabulary, as many rows are run as there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from hf_zipit.refit.answers import classes_last, divergence, spread_of, statistics
from hf_zipit.refit.ending import Ending
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.last_layer import LastLayer
from hf_zipit.refit.positions import Picked, at_rows
from hf_zipit.refit.solvers import Readouts
from hf_zipit.refit.steps import Windows, by_row, take_steps
from hf_zipit.symmetry.ops import shape_of

EVERY = 16
"""After so many steps the samples that are held out are looked at."""

PASSES = 8
"""So often, at most, steps go through all samples, if that is more than `EVERY` steps: they are as dear as heads."""

RIGHT = 0.003
"""Answers that are off by less than this share of what a constant one is off by are right."""

NUMBERS = 2**24
"""No more answers than this to a micro-batch are fitted, and where these have to be made as a whole none are: there is
no room for their gradients."""


@dataclass(frozen=True)
class FittedAnswers:
    """The maps out of the trunk, and by task how far answers to samples that were held out were off, and are now."""

    readouts: Readouts
    errors: Mapping[str, tuple[float, float]]


def refine_answers(fit: Fit, ending: Ending, readouts: Readouts) -> FittedAnswers | None:
    """Write better weights of the last layer into the merged model.

    Returns:
        The maps out of the trunk that go with them; None where there are no better ones, or no room for answers.
    """
    if ending.numbers > NUMBERS and not (ending.by_rows and fit.config.rows_per_input):
        return None
    answers, layer = AnswerErrors(fit, ending), LastLayer(fit, ending, readouts)
    first = answers.held_out(layer)
    if not float(first.mean()) > RIGHT:
        return None
    layer.whiten()
    steps = min(fit.config.answer_steps, max(EVERY, PASSES * len(answers.windows)))
    found = take_steps(fit, layer, answers, first=first, steps=steps, every=EVERY, right=RIGHT)
    if found is None:
        return None
    (tensors, better), best = found
    for name, tensor in tensors.items():
        fit.values.merged[name] = tensor
    errors = {task: (float(a), float(b)) for task, a, b in zip(fit.tasks, first, best, strict=True)}
    return FittedAnswers(better, errors)


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
        self.windows = Windows(fit)
        with torch.no_grad():
            self.sizes = self._sizes()

    def held_out(self, layer: LastLayer) -> Tensor:
        """By task how far answers to samples that are held out are off, as a share of what a constant is off by."""
        total = self.fit.zeros(len(self.fit.tasks))
        with torch.no_grad():
            for b in range(len(self.values.batches)):
                held = self.windows.held(b)
                if bool(held.any()):
                    for t, name, off in self._off(layer, b, held):
                        total[t] += off.to(total) / self._whole(t, name, self.sizes[t, name].held)
        return self.fit.all_reduce(total)

    def backward(self, layer: LastLayer, step: int) -> None:
        """Add up the gradients of this process's samples in a step."""
        share = self.windows.share(step)
        for b, seen in self.windows.seen(step):
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
        tasks, rows = self._tasks(b), self._rows(b, samples)
        for t, given in zip(tasks, layer.read(b, tasks, rows), strict=True):
            wanted = self._expert(t, b, rows)
            for name, found in self._run(t, b, given).items():
                off = divergence(found, wanted[name], self.ending.answers[name][1])
                yield t, name, (off * self._weights(off, b, samples, rows)).sum()

    def _rows(self, b: int, samples: Tensor) -> Tensor | None:
        """The rows of answers that count, of some samples; None where answers have to be made as a whole."""
        if not self.ending.by_rows:
            return None
        rows, _ = self._pick(b)
        count = prod(self._shape[:-1])
        rows = torch.arange(count, device=samples.device)[rows]
        return rows[by_row(samples, count)[rows]]

    @property
    def _shape(self) -> list[int]:
        """Of the answers to a micro-batch."""
        return shape_of(next(iter(self.ending.answers.values()))[0])

    def _pick(self, b: int) -> tuple[Picked, Tensor]:
        """No more rows than there is room for, and what they count."""
        room = NUMBERS * prod(self._shape[:-1]) // self.ending.numbers
        return self.fit.rows.pick(self._shape, b, -1, room * self.fit.rows.all_batches, 1)

    def _expert(self, t: int, b: int, rows: Tensor | None) -> dict[str, Tensor]:
        read = {node: (entry.axis, self.values.of(node, t, b)) for entry, node in self.ending.readouts.items()}
        with torch.no_grad():
            given = {node: x if rows is None else at_rows(x, axis, rows) for node, (axis, x) in read.items()}
            return self._run(t, b, given)

    def _run(self, t: int, b: int, given: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
        """What expert t's branch makes of the values that it reads."""
        known = self.values.follow(self.ending.heads, given, t, b)
        return {name: classes_last(known[node].float()) for name, (node, _) in self.ending.answers.items()}

    def _sizes(self) -> dict[tuple[int, str], Size]:
        """By task and field of its answers; one pass over all samples of the experts' heads."""
        kinds = {name: kind for name, (_, kind) in self.ending.answers.items()}
        sums: dict[tuple[int, str], Tensor] = {}
        for b in range(len(self.values.batches)):
            held = self.windows.held(b)
            rows = self._rows(b, torch.ones_like(held))
            for t in self._tasks(b):
                for name, y in self._expert(t, b, rows).items():
                    middle, own = statistics(y, kinds[name])
                    fitted, apart = (self._weights(own, b, some, rows) for some in (~held, held))
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

    def _weights(self, like: Tensor, b: int, samples: Tensor, rows: Tensor | None) -> Tensor:
        """What every answer of some samples counts, in the shape of answers without their classes."""
        if rows is None:
            weights = self.fit.rows.weights((*like.shape, 1), b, -1).reshape(like.shape)
            return weights * samples.reshape(-1, *(1 for _ in like.shape[1:]))
        count = prod(self._shape[:-1])
        picked, weights = self._pick(b)
        every = weights.new_zeros(count).index_put_((torch.arange(count, device=rows.device)[picked],), weights)
        return (every * by_row(samples, count))[rows]

    def _tasks(self, b: int) -> list[int]:
        task = self.values.batches[b].task
        return list(self.values.experts) if task is None else [task]
