"""Gates: which tasks' residues every token gets, layer by layer, where no task is named (SMILE, arXiv 2408.10174).

A linear layer y = W x + b of the trunk is, in a joint forward pass, y + sum_t g_t(x) (R_t x + r_t), with the residues
R_t of its weight and r_t of its bias, and the gates g: the softmax over the tasks of |V_t x|, of which the largest are
kept and made to sum to one. V_t, the `directions`, are orthonormal. So a joint pass runs the trunk once, and every
token through as many residues as it has tasks; where a task is named, its residues are added as ever.

State dict: `gates.NUMBER.directions` int16 `[tasks, rank, units]`, half precision by its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..errors import ZipItError
from .residue import from_half
from .residues import ModuleResidues
from .trunk import module_under, running_jointly

LINEAR = (nn.Linear, Conv1D)
"""Layers that can have gates."""


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of such a layer as `[out, in]`."""
    return weight.T if isinstance(module, Conv1D) else weight


class Gate(nn.Module):
    """The gates of one layer, of whose residues it is told by `of`; `tasks`: their names as modules."""

    def __init__(self, tasks: Sequence[str], rank: int, units: int, top: int) -> None:
        super().__init__()
        self.tasks, self.top = list(tasks), top
        self.register_buffer("directions", torch.zeros(len(self.tasks), rank, units, dtype=torch.int16))
        self._residues: tuple[ModuleResidues, ...] = ()

    def of(self, residues: ModuleResidues) -> Gate:
        """Read these residues, which are no part of this module."""
        self._residues = (residues,)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The gates of tokens `[..., units]`, `[..., tasks]`, float32."""
        along = linear(x.float(), from_half(self.directions).flatten(0, 1))
        lengths = along.unflatten(-1, self.directions.shape[:2]).norm(dim=-1)
        found = lengths.softmax(-1).topk(self.top)
        return torch.zeros_like(lengths).scatter(-1, found.indices, found.values / found.values.sum(-1, keepdim=True))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: in a joint forward pass the output has the residues that its tokens get."""
        if not running_jointly():
            return None
        rows = args[0].reshape(-1, args[0].shape[-1])
        gates = self(rows).to(output)
        more = output.new_zeros(len(rows), output.shape[-1])
        for number, task in enumerate(self.tasks):
            (index,) = gates[:, number].nonzero(as_tuple=True)
            own = self._residues[0].tensors(task) if len(index) else {}
            if not own:
                continue
            change = output.new_zeros(len(index), output.shape[-1])
            if "weight" in own:
                change = linear(rows[index], matrix_of(module, own["weight"]).to(output))
            if "bias" in own:
                change = change + own["bias"].to(output)
            more = more.index_add(0, index, gates[index, number, None] * change)
        return output + more.view_as(output)

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: zero."""
        self.directions.zero_()


def make_gates(
    setting: Mapping[str, Any],
    trunk: nn.Module,
    residues: Iterable[nn.Module],
    settings: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
) -> nn.ModuleList:
    """The gates, zero, hooked to their layers behind the residues' own hooks.

    Args:
        setting: `config.gates`; raises ZipItError where a layer is not in the trunk or has no residues.
        trunk, residues: of the merged model.
        settings: of the residues, in the order of these: `config.residues`.
        tasks: their names as modules.
    """
    paths = dict.fromkeys(residue["tensor"].rpartition(".")[0] for residue in settings)
    by_path = dict(zip(paths, residues, strict=True))
    found = nn.ModuleList()
    for layer in setting["layers"]:
        module = module_under(trunk, layer["module"], "gates")
        if layer["module"] not in by_path:
            raise ZipItError(f"gates names '{layer['module']}', which has no residues.")
        gate = Gate(tasks, layer["rank"], layer["units"], setting["top"]).of(by_path[layer["module"]])
        module.register_forward_hook(gate.after)
        found.append(gate)
    return found
