"""What running a recipe made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_zipit.evaluation.results import Accuracies, Measurement, Scores
from hf_zipit.recipe.sections import Recipe
from hf_zipit.refit import RefitReport


@dataclass(frozen=True)
class RunResult:
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
        return {
            "recipe": self.recipe.to_dict(),
            "experts": self.experts.to_dict() if self.experts else None,
            "expert_scores": {task: dict(found) for task, found in self.expert_scores.items()},
            "expert_parameters": self.expert_parameters,
            "results": [row.to_dict() for row in self.rows],
            "kept": self.kept.to_dict() if self.kept else None,
            "model": str(self.model) if self.model else None,
            "plot": str(self.plot) if self.plot else None,
            "refit_errors": self.refit.to_dict() if self.refit else None,
            "pushed": self.pushed,
        }
