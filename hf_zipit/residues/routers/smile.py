"""`smile`: SMILE (arXiv 2408.10174): of which tasks a token is, layer by layer, by the weights alone.

In every linear layer of the trunk a token is of the tasks in whose task vectors' leading directions most of it lies:
with V_t the leading right singular vectors of the task vector W_t - W_0, the gates are the softmax over the tasks of
|V_t^T x|, of which the largest are kept and made to sum to one.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import RecipeError
from hf_zipit.factorise import svd
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.modeling.gates import LINEAR, matrix_of
from hf_zipit.modeling.residue import SAME, to_half
from hf_zipit.planning.plan import Plan
from hf_zipit.residues.routing import register
from hf_zipit.residues.stage import TaskTensors

logger = logging.getLogger(__name__)


def check_options(planned: Plan, *, rank: int = 16, top: int = 1) -> None:
    """Raise RecipeError for options out of range."""
    if rank < 1:
        raise RecipeError(f"smile's rank is {rank}; it must be at least 1")
    if not 1 <= top <= len(planned.tasks):
        raise RecipeError(
            f"smile's top is {top}; it must be at least 1 and at most the number of tasks, {len(planned.tasks)}"
        )


@register("smile", check=check_options, needs_origin=True)
@torch.no_grad()
def smile(
    merged: ZipItPreTrainedModel,
    planned: Plan,
    maps: Alignment,
    calibration: Calibration | None,
    *,
    rank: int = 16,
    top: int = 1,
) -> None:
    """Where no task is named, every token of a linear layer gets the residues of the tasks that it is found to be of.

    Without a base there are no task vectors, and the directions are those of the tasks' own weights.

    Args:
        merged, planned, maps, calibration: as of every router; data is not read.
        rank: so many directions of a task vector say how much of a token is its task's; the paper's k_gate.
        top: of so many tasks at most a token is.
    """
    tensors = TaskTensors(merged, planned, maps, None)
    changed = {setting["tensor"] for setting in merged.config.residues}
    layers, directions = [], []
    for path, module in merged.trunk.named_modules():
        name = f"{path}.weight"
        if not isinstance(module, LINEAR) or name not in changed:
            continue
        found = [tensor.vector if planned.bases else tensor.own for tensor in tensors.of_tensor(name)]
        least = SAME * float(module.weight.norm())
        leading = torch.stack([leading_directions(matrix_of(module, matrix), rank, least) for matrix in found])
        layers.append({"module": path, "rank": leading.shape[1], "units": leading.shape[2]})
        directions.append(leading)
    if not layers:
        logger.warning("No linear layer has residues for smile to choose among; without a task they are not added.")
        return
    made = merged.add_gates(top, layers)
    for gate, leading in zip(made, directions, strict=True):
        gate.directions.copy_(to_half(leading))


def leading_directions(matrix: Tensor, rank: int, least: float) -> Tensor:
    """The first right singular vectors `[rank, in]`; zero where the singular value is no more than `least`."""
    _, values, directions = svd(matrix)
    return directions[:rank] * (values[:rank, None] > least)
