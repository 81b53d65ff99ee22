"""What running a recipe made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_zipit.evaluation.results import Accuracies, Measurement, Scores
from hf_zipit.recipe.sections import Recipe
from hf_zipit.refit import RefitReport
from hf_zipit.schema import Plain


@dataclass(frozen=True)
class RunResult(Plain):
    """What a recipe made.

    Attributes:
        recipe: what was run.
        experts: the accuracies of the experts side by side; None where nothing was evaluated.
        expert_scores: their further metrics.
        expert_parameters: of all experts together.
        rows: one for every method and depth.
        kept: the row of the model that was saved, if one was.
        model: its folder.
        plot: the picture of accuracy over depth, if there was something to draw.
        refit: the errors of the kept model's refit, if it had one.
        pushed: the address of the repo or pull request that it was pushed to.
    """

    recipe: Recipe
    experts: Accuracies | None
    expert_parameters: int
    rows: tuple[Measurement, ...]
    kept: Measurement | None = None
    expert_scores: Scores = field(default_factory=dict)
    model: Path | None = None
    plot: Path | None = None
    refit: RefitReport | None = None
    pushed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        found["results"], found["refit_errors"] = found.pop("rows"), found.pop("refit")
        return found
