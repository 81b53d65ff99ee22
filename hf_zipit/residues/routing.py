"""The router of a merged model, solved: a linear discriminant between the tasks' unlabelled samples.

With the mean feature mu_t of every task and the covariance C that all have in common, a sample is of the task with the
largest mu_t C^-1 x - mu_t C^-1 mu_t / 2 (Fisher). The tasks count the same, however many samples each has.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_zipit.data.calibration import Calibration
from hf_zipit.data.processes import running
from hf_zipit.errors import DataError, SpecError
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.modeling.router import end_with_features, read_features
from hf_zipit.planning.plan import Plan

RIDGE = 1e-3
"""Relative to the mean variance of a feature."""


def wants_router(planned: Plan) -> bool:
    return planned.config.residues is not None and planned.config.residues.router


def check_router(planned: Plan, calibration: Calibration | None) -> None:
    """Raise, where the config asks for a router, what it needs and is not there.

    Raises:
        DataError: there is no calibration data, or it does not say which task each sample is of.
        SpecError: the trunk has no block.
    """
    if not wants_router(planned):
        return
    if calibration is None or not calibration.read(planned.experts).by_task:
        raise DataError("The router tells the tasks apart by unlabelled samples: give calibration data by task.")
    first_block(planned)


def first_block(planned: Plan) -> str:
    """The path of the trunk's first block."""
    shared = planned.cut.shared
    for block in planned.spec.blocks:
        if any(path in ("", block.path) or block.path.startswith(f"{path}.") for path in shared):
            return block.path
    raise SpecError("The trunk has no block that a router could read; merge more of the model, or leave router out.")


def add_router(merged: ZipItPreTrainedModel, planned: Plan, calibration: Calibration | None) -> None:
    """Give a merged model a router, in place, where the config asks for one."""
    if not wants_router(planned):
        return
    assert calibration is not None
    module = first_block(planned)

    def features() -> list[Tensor]:
        found: dict[str, list[Tensor]] = {task: [] for task in planned.tasks}
        for batch in calibration.batches():
            inputs = {name: tensor.to(calibration.device) for name, tensor in batch.inputs.items()}
            run = partial(merged.run_branch, planned.tasks[0], inputs)
            found[batch.task].append(read_features(inputs, run).double().cpu())
        return [torch.cat(parts) for parts in found.values()]

    hook = merged.trunk.get_submodule(module).register_forward_hook(end_with_features)
    try:
        with running([merged], calibration.device):
            weight, bias = discriminant(calibration.while_it_fits(features))
    finally:
        hook.remove()
    merged.add_router(module, weight, bias)


def discriminant(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights `[tasks, d]` and biases `[tasks]`, of every task's features `[samples, d]`, float64."""
    means = torch.stack([x.mean(0) for x in rows])
    within = torch.stack([(x - x.mean(0)).T @ (x - x.mean(0)) / len(x) for x in rows]).mean(0)
    spread = within.diagonal().mean().clamp_min(1e-30)
    within = within + RIDGE * spread * torch.eye(len(within), dtype=within.dtype)
    weight = torch.linalg.solve(within, means.T).T
    return weight, -(weight * means).sum(1) / 2
