"""Mixtures of task vectors: MLPs that are merged anew for every sample (WEMoE, arXiv 2402.00433).

The linear layers y = W x + b of an MLP of the trunk are y + sum_t g_t(h) (D_t x + e_t), with the task vectors D_t and
e_t of their weights and biases, and weights g of every task and sample that a small router makes of the MLP's input h:

    g(h) = mean over the positions of (up relu(down h + inner) + outer).

So no task has to be known, and where one is named it says only which head answers: the trunk computes the same for
all. Padding does not count, where the branch is given an `attention_mask`.

State dict: `mixtures.NUMBER.{down,inner,up,outer}`, float, and `mixtures.NUMBER.vectors.LAYER.TASK.TENSOR.*`, which
are packed like residues (`residue.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .gates import matrix_of
from .kinds.low_rank import LowRank
from .residue import Dense, Residue
from .trunk import module_under, notes

MASK = "attention_mask"
"""The argument of branches, and the note in a forward pass, that says which positions are no padding."""


class VectorMixture(nn.Module):
    """One MLP's router and task vectors; until they are set, nothing is added.

    Attributes:
        down, inner, up, outer: the router's parameters `[hidden, units]`, `[hidden]`, `[tasks, hidden]`, `[tasks]`.
        vectors: by layer, by task and by the tensor's name, the task vectors.
    """

    def __init__(self, layers: Sequence[nn.Module], units: int, hidden: int, rank: int, tasks: Sequence[str]) -> None:
        """`rank`: of the weights' task vectors, 0 for whole ones; `units`: of the MLP's input."""
        super().__init__()
        self.down = nn.Parameter(torch.zeros(hidden, units))
        self.inner = nn.Parameter(torch.zeros(hidden))
        self.up = nn.Parameter(torch.zeros(len(tasks), hidden))
        self.outer = nn.Parameter(torch.zeros(len(tasks)))
        self.vectors = nn.ModuleList(
            nn.ModuleDict({task: nn.ModuleDict(_empty(layer, rank)) for task in tasks}) for layer in layers
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights of samples `[samples, ..., units]`, `[samples, tasks]`; mask `[samples, positions]`."""
        inside = linear(x, self.down.to(x), self.inner.to(x)).relu()
        found = linear(inside, self.up.to(x), self.outer.to(x)).flatten(1, -2)
        if mask is None or mask.shape != found.shape[:2]:
            return found.mean(1)
        counted = mask[..., None].to(found)
        return (found * counted).sum(1) / counted.sum(1).clamp_min(1)

    def after(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the MLP's layer of that number; the first one reads what enters the MLP."""
        x, noted = args[0], notes()
        if number == 0:
            noted[id(self)] = self(x.unsqueeze(1) if x.dim() == 2 else x, noted.get(MASK))
        gates = noted.pop(id(self)) if number == len(self.vectors) - 1 else noted[id(self)]
        for column, own in zip(gates.unbind(-1), self.vectors[number].values(), strict=True):
            change = linear(x, matrix_of(module, own["weight"].tensor()).to(x))
            if "bias" in own:
                change = change + own["bias"].tensor().to(change)
            output = output + column.view(-1, *[1] * (output.dim() - 1)) * change
        return output

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: zero."""
        for parameter in (self.down, self.inner, self.up, self.outer):
            parameter.zero_()


def _empty(layer: nn.Module, rank: int) -> dict[str, Residue]:
    """The task vectors of a layer's tensors, zero."""
    shape = layer.weight.shape
    weight = LowRank(shape, min(rank, *shape)) if rank else Dense(shape)
    found: dict[str, Residue] = {"weight": weight}
    return found if layer.bias is None else {**found, "bias": Dense(layer.bias.shape)}


def make_mixtures(
    settings: Sequence[Mapping[str, Any]], trunk: nn.Module, branches: Iterable[nn.Module], tasks: Iterable[str]
) -> nn.ModuleList:
    """The mixtures, hooked to their layers; bound methods, so that a deep copy reads the copy's.

    Args:
        settings: `config.mixtures`; raises ZipItError if a layer is not in the trunk.
        branches: whose masks count.
        tasks: the tasks' names as modules.
    """
    found, tasks = nn.ModuleList(), list(tasks)
    for setting in settings:
        layers = [module_under(trunk, path, "mixtures") for path in setting["layers"]]
        units = matrix_of(layers[0], layers[0].weight).shape[1]
        mixture = VectorMixture(layers, units, setting["hidden"], setting["rank"], tasks)
        for number, layer in enumerate(layers):
            layer.register_forward_hook(partial(mixture.after, number))
        found.append(mixture)
    for branch in branches:
        branch.register_forward_pre_hook(note_mask, with_kwargs=True)
        branch.register_forward_hook(forget_mask, always_call=True)
    return found


def note_mask(branch: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Forward pre-hook of a branch: its mixtures leave padding out."""
    notes()[MASK] = kwargs.get(MASK)


def forget_mask(branch: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a branch."""
    notes().pop(MASK, None)
