"""What the refit achieved, module by module: where a merge loses accuracy shows here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_zipit.schema import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RefitReport:
    """Relative squared errors of the regressions.

    Attributes:
        tasks: the experts, in order; `unknown task` for samples whose task is unknown.
        errors: per module, in execution order, and task: the squared error on that task's calibration samples over the
            variance of the target. 0 is perfect, 1 no better than a constant. A module that writes into a residual
            stream is measured at the stream.
        untouched: tensors that were not regressed and keep the combined values: numbers for all units, norms of heads.
    """

    tasks: tuple[str, ...]
    errors: Mapping[str, Mapping[str, float]]
    untouched: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Lists of tasks, modules, and per module the errors by task: configuration files sort the keys of dicts."""
        tasks = list(dict.fromkeys(task for by_task in self.errors.values() for task in by_task))
        return {
            "tasks": tasks,
            "modules": list(self.errors),
            "errors": [
                [round(by_task[task], 6) if task in by_task else None for task in tasks]
                for by_task in self.errors.values()
            ],
            "untouched": list(self.untouched),
        }

    @classmethod
    def of(cls, model: PreTrainedModel) -> RefitReport | None:
        """The report of a merged model's refit; None if it had none."""
        saved = model.config.method.get("refit_errors")
        return cls.from_dict(unpacked(saved)) if saved else None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> RefitReport:
        """The report from what `to_dict` gave."""
        tasks, modules, rows = saved["tasks"], saved["modules"], saved["errors"]
        errors = {
            module: {task: e for task, e in zip(tasks, row, strict=True) if e is not None}
            for module, row in zip(modules, rows, strict=True)
        }
        return cls(tuple(tasks), errors, tuple(saved["untouched"]))

    @property
    def mean(self) -> float:
        """Over all modules and tasks."""
        errors = [error for by_task in self.errors.values() for error in by_task.values()]
        return sum(errors) / max(len(errors), 1)

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The modules with the largest mean error."""
        means = {module: sum(e.values()) / max(len(e), 1) for module, e in self.errors.items()}
        return sorted(means.items(), key=lambda item: -item[1])[:count]
