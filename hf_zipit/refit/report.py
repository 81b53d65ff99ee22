"""What the refit achieved, module by module: where a merge loses accuracy shows here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        rows: per module how many rows (samples times positions) entered its regression, and how many there were:
            `rows_per_input` for every input are enough, beside those that the head reads.
        answers: by task how far answers to samples that were held out were off before the last layer was fitted to
            answers, and after it, as a share of what a constant answer is off by; none where they were right or
            nothing helped.
        written: by task how many samples its expert wrote, beside those that were given.
        spliced: by task how many samples were spliced of those that were given.
    """

    tasks: tuple[str, ...]
    errors: Mapping[str, Mapping[str, float]]
    untouched: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    answers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    written: Mapping[str, int] = field(default_factory=dict)
    spliced: Mapping[str, int] = field(default_factory=dict)

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
            "rows": [list(self.rows.get(module, ())) for module in self.errors],
            "answers": [[task, *(round(error, 6) for error in errors)] for task, errors in self.answers.items()],
            "written": [[task, count] for task, count in self.written.items()],
            "spliced": [[task, count] for task, count in self.spliced.items()],
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
        counted = saved.get("rows") or [()] * len(saved["modules"])  # reports of older versions have none
        rows = {
            module: (int(row[0]), int(row[1])) for module, row in zip(saved["modules"], counted, strict=True) if row
        }
        answers = {task: (before, after) for task, before, after in saved.get("answers", ())}
        written, spliced = (dict(saved.get(name, ())) for name in ("written", "spliced"))
        return cls(tuple(tasks), errors, tuple(saved["untouched"]), rows, answers, written, spliced)

    def rows_in_words(self) -> str | None:
        """How many rows were used and why; None where that is not known."""
        if not self.rows:
            return None
        most = max(known for _, known in self.rows.values())
        every = [used for used, known in self.rows.values() if used == known]
        some = [used for used, known in self.rows.values() if used < known]
        if not some:
            return f"all rows (at most {most:,}): every layer is small enough to read them all"
        used = f"{min(some):,}" if min(some) == max(some) else f"{min(some):,} to {max(some):,}"
        told = f"{used} of at most {most:,} rows in {len(some)} regressions, as many as inputs need (rows_per_input)"
        return f"{told}; all rows in {len(every)}" if every else told

    @property
    def mean(self) -> float:
        """Over all modules and tasks."""
        errors = [error for by_task in self.errors.values() for error in by_task.values()]
        return sum(errors) / max(len(errors), 1)

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The modules with the largest mean error."""
        means = {module: sum(e.values()) / max(len(e), 1) for module, e in self.errors.items()}
        return sorted(means.items(), key=lambda item: -item[1])[:count]
