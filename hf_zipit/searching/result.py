"""What a search found: every trial, the best one, and the frontier of score against size and computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_zipit.errors import RecipeError
from hf_zipit.evaluation.results import Accuracies
from hf_zipit.recipe.sections import Recipe
from hf_zipit.refit import RefitConfig
from hf_zipit.schema import Plain, build
from hf_zipit.searching.space import Setting


@dataclass(frozen=True)
class Trial(Plain):
    """One merge of a search.

    Attributes:
        number: from 0, in the order they were run.
        setting: what was merged how.
        score: the higher the better; None if the merge failed.
        accuracy: what the score was taken from; None where the score is the caller's own.
        parameters: of the merged model.
        macs: multiply-accumulates of one sample answered for all tasks.
        seconds: that merging took.
        error: why there is no score, in one sentence; empty if there is one.
    """

    number: int
    setting: Setting
    score: float | None = None
    accuracy: Accuracies | None = None
    parameters: int = 0
    macs: int = 0
    seconds: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "seconds": round(self.seconds, 3)}

    def beats(self, other: Trial) -> bool:
        """Whether it is as good, as small and as fast as another trial, and better in one of the three."""
        mine, theirs = self._rank(), other._rank()
        return mine != theirs and all(m <= t for m, t in zip(mine, theirs, strict=True))

    def _rank(self) -> tuple[float, int, int]:
        """The less the better; only for trials that have a score."""
        return -(self.score or 0.0), self.parameters, self.macs


@dataclass(frozen=True)
class SearchResult(Plain):
    """What a search found.

    Attributes:
        trials: in the order they were run.
        measure: what the score is: `"mean"` or `"joint"` accuracy, or `"own"` for the caller's function.
        answers: who said what is right: the `"labels"` of the data or the `"experts"`; None for the caller's function.
        samples: held-out samples, by task.
        experts: the experts' accuracies on the same samples; None for the caller's function.
        expert_parameters, expert_macs: of one expert.
        sampler, seed: how settings were chosen.
        max_size: the best trial has at most this multiple of one expert's parameters.
    """

    trials: tuple[Trial, ...]
    measure: str
    answers: str | None
    samples: Mapping[str, int]
    experts: Accuracies | None
    expert_parameters: int
    expert_macs: int
    sampler: str
    seed: int
    max_size: float | None = None

    @property
    def best(self) -> Trial:
        """The trial with the highest score, among equals the smallest, then the fastest, then the first.

        Raises RecipeError if no merge succeeded within `max_size`.
        """
        best = self.best_or_none
        if best is None:
            raise RecipeError(self._why_none())
        return best

    @property
    def frontier(self) -> tuple[Trial, ...]:
        """The trials that no other beats (of equals the first), from small to large."""
        good = [trial for trial in self.trials if trial.score is not None]
        kept: dict[tuple[float, int, int], Trial] = {}
        for trial in good:
            if not any(other.beats(trial) for other in good):
                kept.setdefault(trial._rank(), trial)
        return tuple(sorted(kept.values(), key=lambda trial: (trial.parameters, trial.macs)))

    @property
    def best_or_none(self) -> Trial | None:
        """The best trial; None where `best` would raise."""
        limit = float("inf") if self.max_size is None else self.max_size * self.expert_parameters
        good = (trial for trial in self.trials if trial.score is not None and trial.parameters <= limit)
        return min(good, key=lambda trial: (*trial._rank(), trial.number), default=None)

    def _why_none(self) -> str:
        errors = [trial.error for trial in self.trials if trial.error]
        if len(errors) == len(self.trials):
            return f"None of the {len(self.trials)} merges succeeded; the first one said: {errors[0]}"
        return f"No merge is within max_size {self.max_size:g}; allow larger models, or search a greater depth."

    def to_dict(self) -> dict[str, Any]:
        best = self.best_or_none
        return {
            **super().to_dict(),
            "best": best.number if best else None,
            "frontier": [trial.number for trial in self.frontier],
        }


def with_setting(recipe: Recipe, setting: Setting) -> Recipe:
    """A recipe that makes one merge: that of a setting."""
    return replace(
        recipe,
        method=(setting.method,),
        depth=(setting.depth,),
        settings={**recipe.settings, "residual": setting.residual},
        options={setting.method: dict(setting.options)} if setting.options else {},
        refit=build(RefitConfig, setting.refit, "refit") if setting.refit is not None else None,
        search=None,
        save=None,
    )
