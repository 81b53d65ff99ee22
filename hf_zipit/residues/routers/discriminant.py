"""`discriminant`: which task a sample is of, by a linear discriminant between the tasks' unlabelled samples.

With the mean feature mu_t of every task and the covariance C that all have in common, a sample is of the task with the
largest mu_t C^-1 x - mu_t C^-1 mu_t / 2 (Fisher). The tasks count the same, however many samples each has.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_zipit.data.calibration import Calibration
from hf_zipit.data.processes import running
from hf_zipit.errors import SpecError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.modeling.router import end_with_features, read_features
from hf_zipit.planning.plan import Plan
from hf_zipit.residues.routing import register

RIDGE = 1e-3
"""Relative to the mean variance of a feature."""


def first_block(planned: Plan) -> str:
    """The path of the trunk's first block; raises SpecError where it has none."""
    shared = planned.cut.shared
    for block in planned.spec.blocks:
        if any(path in ("", block.path) or block.path.startswith(f"{path}.") for path in shared):
            return block.path
    raise SpecError("The trunk has no block that a router could read; merge more of the model, or leave router out.")


@register("discriminant", check=first_block, by_task=True)
def discriminant_router(
    merged: ZipItPreTrainedModel, planned: Plan, maps: Alignment, calibration: Calibration | None
) -> None:
    """For `task="auto"`, on what the trunk's first block makes of a sample."""
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
