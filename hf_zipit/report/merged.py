"""What a merged model is, for a person: its tasks, what they share, how large each part is and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.refit import RefitReport
from hf_zipit.report.tables import new_table
from hf_zipit.schema import Plain


@dataclass(frozen=True)
class MergedParts(Plain):
    """The parts of a merged model.

    Attributes:
        architecture: the experts' class.
        tasks: by task its `classes`, the `parameters` of its own and where its `expert` came from.
        trunk: parameters that all tasks share.
        parameters: of the whole model.
        experts: parameters of all experts together, if known.
        depth: the share of the blocks that is shared, if known.
        method: how the units were matched, and what followed.
        refit: the mean relative error of the refit, if there was one.
    """

    architecture: str
    tasks: Mapping[str, Mapping[str, Any]]
    trunk: int
    parameters: int
    experts: int
    depth: float | None
    method: str
    refit: float | None

    def lines(self) -> Sequence[str]:
        """What the table does not say."""
        of = f", {self.parameters / self.experts:.0%} of its experts'" if self.experts else ""
        depth = "" if self.depth is None else f", {self.depth:.0%} of the blocks are shared"
        left = "" if self.refit is None else f", relative error of the refit {self.refit:.3f} on average"
        return (
            f"{self.architecture}, {self.parameters:,} parameters{of}{depth}.",
            f"Merged by {self.method}{left}.",
            "The spaces of one task as a plain model: hf-zipit inspect MODEL --task NAME.",
        )


def merged_parts(model: ZipItPreTrainedModel) -> MergedParts:
    """The parts of a loaded merged model."""
    method, report = model.config.method, RefitReport.of(model)
    own = {
        task: sum(size(part[key]) for part in (model.branches, model.entries, model.exits))
        for task, key in model.branch_names.items()
    }
    words = [str(method.get("method", "hand"))]
    words += ["root"] if method.get("root") else []
    words += ["refit"] if method.get("refit") else []
    words += [next(iter(found)) for found in method.get("corrections") or ()]
    words += ["polish"] if method.get("polish") else []
    tasks = {
        task: {
            "classes": list(model.config.labels_of(task).values()),
            "parameters": own[task],
            "expert": method.get("experts", {}).get(task, {}).get("model"),
        }
        for task in model.config.tasks
    }
    return MergedParts(
        str(model.config.source_architecture), tasks, size(model.trunk), model.num_parameters(),
        method.get("expert_parameters", 0), model.config.depth, " + ".join(words), report and report.mean,
    )  # fmt: skip


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parts_table(parts: MergedParts, title: str = "") -> Table:
    """A line for what is shared and one for every task."""
    table = new_table(title, ["part", "classes", "expert"], ["parameters"])
    table.add_row("shared by all", "", "", f"{parts.trunk:,}", end_section=True)
    for task, found in parts.tasks.items():
        table.add_row(task, ", ".join(found["classes"]) or "-", found["expert"] or "-", f"{found['parameters']:,}")
    return table
