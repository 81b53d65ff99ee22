"""What adapted layers are fed, seen through all experts' A: second moments of a few numbers a row.

Every expert runs over its own task's data as the full model that it makes of its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_zipit.data.calibration import Calibration
from hf_zipit.data.processes import all_reduce_sum, running
from hf_zipit.errors import ExpertError
from hf_zipit.experts.loading import load_experts
from hf_zipit.lora.adapter import LoraAdapter
from hf_zipit.lora.rule import Updates
from hf_zipit.observation.layers import is_layer, rows_of
from hf_zipit.observation.observe import arguments_for
from hf_zipit.observation.record import mask_of


def projected_moments(
    adapters: Mapping[str, LoraAdapter], updates: Updates, calibration: Calibration
) -> dict[str, list[Tensor]]:
    """E[z z^T] by layer and expert, as `Given.moments` says.

    Raises:
        ExpertError: an adapter cannot become a full model, or a layer is of a kind whose inputs cannot be seen.
        DataError: the data is not what the models take.
    """
    experts = load_experts({task: adapter.source for task, adapter in adapters.items()})
    calibration.read(experts)
    accelerator = calibration.run_on()
    seeing = {name: torch.cat([own.a for own in layer]) for name, layer in updates.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in updates}
    mine = calibration.batches()[calibration.process :: calibration.processes]
    for task, expert in experts.items():
        # A row more, for the number of rows: one sum over the processes.
        sums = {name: a.new_zeros(len(a) + 1, len(a)) for name, a in seeing.items()}
        state: dict[str, Tensor | None] = {"mask": None}
        with running([expert], accelerator.device):
            handles = [
                _module(expert, name, task).register_forward_pre_hook(
                    partial(_see, seeing[name], sums[name], state), with_kwargs=True
                )
                for name in seeing
            ]
            try:
                for batch in mine:
                    if batch.task in (None, task):
                        arguments = arguments_for(expert, batch.inputs, accelerator.device)
                        state["mask"] = mask_of(arguments)
                        expert(**arguments)
            finally:
                for handle in handles:
                    handle.remove()
        for name, total in sums.items():
            total = all_reduce_sum(total, accelerator)
            found[name].append(total[:-1] / total[-1, :1].clamp_min(1))
    return found


def _module(expert: nn.Module, name: str, task: str) -> nn.Module:
    module = expert.get_submodule(name)
    if not isinstance(module, nn.Embedding) and not is_layer(module):
        raise ExpertError(
            f"{name} of the adapter {task!r} is a {type(module).__name__}, whose inputs the rule cannot see; choose "
            "another rule"
        )
    return module


@torch.no_grad()
def _see(
    a: Tensor,
    total: Tensor,
    state: Mapping[str, Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if isinstance(module, nn.Embedding):
        mask = state["mask"]
        ids = x[mask.bool()] if mask is not None and mask.shape == x.shape else x
        z = functional.embedding(ids.flatten().cpu(), a.T)
    else:
        z = rows_of(module, x, state["mask"]).double().cpu() @ a.T
    total[:-1] += z.T @ z
    total[-1] += len(z)
