"""Joint heads: logits of different tasks made comparable, without touching the order of the classes within a task.

The heads of separately trained experts say nothing about samples of other tasks: their concatenated logits decide by
accident which task a sample belongs to. The calibration data tells every sample's task, so a linear discriminant on
the features that a head reads gives the log-odds of its own task (Fisher; ridge as in the rest of the refit). These
log-odds
are added to all logits of the task alike: one more direction in the head's last linear layer, and the answers within
a task stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration, MicroBatch
from hf_zipit.data.processes import running
from hf_zipit.errors import RecipeError
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.regression import Gram, ridge

RIDGE = 1e-2
"""Relative ridge of the discriminant: a few hundred samples must not be separated by heart."""


def check_joint_heads(planned: Plan, calibration: Calibration) -> None:
    """Raise RecipeError if the config asks for joint heads and the calibration data does not say whose it is."""
    config = planned.config.refit
    if config is not None and config.joint_heads and not calibration.by_task:
        raise RecipeError("joint_heads needs the task of every calibration sample: give calibration data by task")


@torch.no_grad()
def calibrate_joint(merged: PreTrainedModel, planned: Plan, calibration: Calibration | None) -> None:
    """Add every task's log-odds to its logits, in place, where the config asks for joint heads.

    Args:
        merged: a merged model whose joint logits are the tasks' side by side.
        planned: the plan of the merge.
        calibration: data that says which task each sample is of.

    Raises:
        RecipeError: if the joint output is not a concatenation, a head does not end in a linear layer, or a sample has
            no task.
    """
    config = planned.config.refit
    if config is None or not config.joint_heads:
        return
    if merged.config.joint != "concatenate" or not merged.config.task_labels:
        raise RecipeError("joint_heads needs tasks with different classes; this joint output is not a concatenation")
    check_joint_heads(planned, calibration)

    def features_of_tasks() -> dict[str, tuple[nn.Linear, list[tuple[Tensor, int]]]]:
        batches = calibration.micro_batches(config.micro_batch)
        return {task: head_features(merged, task, batches, calibration.device) for task in merged.config.tasks}

    with running([merged], calibration.device):
        features = calibration.while_it_fits(features_of_tasks)
    for own, task in enumerate(merged.config.tasks):
        layer, rows = features[task]
        weight, shift = log_odds(rows, own)
        layer.weight += weight.to(layer.weight.dtype)
        layer.bias += shift.to(layer.bias.dtype)


def head_features(
    merged: PreTrainedModel, task: str, batches: Sequence[MicroBatch], device: torch.device | str = "cpu"
) -> tuple[nn.Linear, list[tuple[Tensor, int]]]:
    """The last linear layer of a task's head, and what it reads on every batch with the task the batch is of."""
    branch = merged.branch(task)
    seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.__setitem__(module, (args[0], out)))
        for module in branch.modules()
        if isinstance(module, nn.Linear)
    ]
    rows = []
    try:
        for batch in batches:
            seen.clear()
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            logits = merged(**inputs, task=task).logits
            last = next((m for m, (_, out) in seen.items() if out.data_ptr() == logits.data_ptr()), None)
            if last is None or last.bias is None:
                raise RecipeError(f"joint_heads needs a head that ends in a linear layer; that of {task!r} does not")
            rows.append((seen[last][0][: batch.real].flatten(0, -2).cpu(), batch.task))
    finally:
        for hook in hooks:
            hook.remove()
    return last, rows  # type: ignore[return-value]


def log_odds(rows: Sequence[tuple[Tensor, int | None]], own: int) -> tuple[Tensor, Tensor]:
    """Direction `[d]` and offset of the log-odds that a row is of the task `own`, under a linear discriminant.

    Both kinds of rows count the same, however many there are.
    """
    width = rows[0][0].shape[1]
    totals = [sum(len(x) for x, task in rows if (task == own) is mine) for mine in (True, False)]
    gram = Gram(width, 1)
    for x, task in rows:
        mine = task == own
        target = torch.full((len(x), 1), 1.0 if mine else -1.0)
        gram.add(x, target, torch.full((len(x),), 0.5 / totals[0 if mine else 1]))
    slope, _ = ridge(gram.reduce(), torch.zeros(1, width), RIDGE)
    direction = slope[0].float()
    scores: Mapping[bool, Tensor] = {
        mine: torch.cat([x @ direction for x, task in rows if (task == own) is mine]) for mine in (True, False)
    }
    means = {mine: score.mean() for mine, score in scores.items()}
    variance = torch.stack([score.var() for score in scores.values()]).mean().clamp_min(1e-12)
    scale = (means[True] - means[False]) / variance
    return scale * direction, -scale * (means[True] + means[False]) / 2
