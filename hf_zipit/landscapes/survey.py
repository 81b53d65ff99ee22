"""Experts, the data their merges look at and the samples that losses are measured on, and the measuring itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_zipit.align.stage import align_trunk
from hf_zipit.data.held_out import Answers, HeldOut, divide, held_out, limit, whole
from hf_zipit.data.inputs import ModelInputs
from hf_zipit.data.labels import IGNORED
from hf_zipit.data.sources import by_task
from hf_zipit.errors import RecipeError
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.landscapes.results import Curve, Losses, Plane
from hf_zipit.landscapes.surface import Surface, make_surface
from hf_zipit.merging import merge, plan, refit_settings
from hf_zipit.observe import Moments
from hf_zipit.observe.observed import Observed, moments_for
from hf_zipit.planning.plan import fold_experts
from hf_zipit.registry import suggestion


@dataclass(frozen=True, eq=False)
class Survey:
    """Experts, the data that merges may look at, and the samples that losses are measured on."""

    experts: Mapping[str, PreTrainedModel]
    calibration: Any
    held: HeldOut
    processor: Any = None
    batch_size: int = 64
    moments: Moments | str | Path | None = None
    accelerator: Accelerator | None = None
    seed: int = 0
    progress: bool = True
    _observed: dict[float | str, Observed] = field(default_factory=dict)

    @classmethod
    def of(
        cls, experts: Experts, calibration: Any, validation: Any = None, *, samples: int = 128,
        hold_out: float = 0.25, answers: Answers = "auto", seed: int = 0, **settings: Any,
    ) -> Survey:  # fmt: skip
        """Load the experts and divide the data; see `landscape`."""
        loaded = load_experts(experts)
        first, tasks = next(iter(loaded.values())), list(loaded)
        if validation is None:
            rest, part = divide(calibration, first, tasks, hold_out, seed)
            calibration = whole(rest)
        else:
            part = by_task(validation, ModelInputs.of(first), tasks)
        part = limit(whole(part), first, tasks, samples, seed)
        kept = {name: settings[name] for name in ("processor", "batch_size") if name in settings}
        held = held_out(part, loaded, answers=answers, **kept)
        return cls(loaded, calibration, held, seed=seed, **settings)

    def pair(self, wanted: Sequence[str] | None) -> tuple[str, str]:
        """The tasks of two experts, the first two by default."""
        tasks = list(self.experts)
        chosen = list(wanted or tasks[:2])
        for task in chosen:
            if task not in tasks:
                raise RecipeError(f"There is no expert {task!r}; {suggestion(task, tasks)}")
        if len(set(chosen)) != 2 or len(chosen) != 2:
            raise RecipeError(f"A line runs between two different experts, not between {chosen}.")
        return chosen[0], chosen[1]

    def surface(self, pair: tuple[str, str], *, method: str, **settings: Any) -> Surface:
        """Merge, and lay the plane through two experts; `settings` are those of `merge`."""
        refit = refit_settings(settings.pop("refit", False))
        if refit is not None:  # between models with different heads there is no line
            refit = replace(refit, split_heads=False)
        planned = plan(self.experts, method=method, **settings)
        if not planned.cut.trunk:
            raise RecipeError("At this depth nothing is shared, so that there is nothing to move; take a larger one.")
        depth = settings.get("depth", 1.0)
        observed = self._observed.setdefault(depth, self._observe(depth))
        found = observed.moments(planned)
        folded = fold_experts(self.experts, planned)
        aligning = {name: settings[name] for name in ("options", "residual", "overrides") if name in settings}
        here = None if found is None else moments_for(folded, planned, None, found, None)
        alignment = align_trunk(folded, planned, here, method, **aligning)
        merged = merge(
            self.experts, self.calibration, method=method, refit=refit or False, processor=self.processor,
            batch_size=self.batch_size, moments=found, accelerator=self.accelerator, seed=self.seed,
            progress=self.progress, **settings,
        )  # fmt: skip
        return make_surface(folded, planned, alignment, merged, pair, method=method, seed=self.seed)

    def _observe(self, depth: float | str) -> Observed:
        """What serves all methods at one depth."""
        return Observed(
            self.experts, self.calibration, [depth], self.moments, processor=self.processor,
            batch_size=self.batch_size, accelerator=self.accelerator, seed=self.seed, progress=self.progress,
        )  # fmt: skip

    def curve(self, surface: Surface, steps: int) -> Curve:
        """Measure on the line between the aligned experts."""
        at = tuple(step / (steps - 1) for step in range(steps))
        found = self._measure(surface, [(x, 0.0) for x in at], f"line, {surface.method}")
        return Curve(found.loss, found.error, surface.method, at, surface.exact)

    def plane(self, surface: Surface, grid: int, margin: float) -> Plane:
        """Measure on a square grid around the experts and the merge, which lie on its lines."""
        across, up = zip(*surface.points.values(), strict=True)
        half = max(max(across) - min(across), max(up) - min(up)) / 2 + margin
        x, y = (grid_lines(marks, half, grid) for marks in (across, up))
        found = self._measure(surface, [(a, b) for b in y for a in x], f"plane, {surface.method}")
        rows = [
            {task: tuple(values[r * grid : (r + 1) * grid] for r in range(grid)) for task, values in kind.items()}
            for kind in (found.loss, found.error)
        ]
        return Plane(*rows, surface.points, tuple(x), tuple(y), surface.through_merge)

    def _measure(self, surface: Surface, points: Sequence[tuple[float, float]], what: str) -> Losses:
        found = []
        for point in tqdm(points, desc=what, unit="point", disable=not self.progress):
            found.append(losses(surface.move(*point), self.held, self.batch_size))
        tasks = list(self.held.tasks)
        return Losses(*({task: tuple(each[task][kind] for each in found) for task in tasks} for kind in (0, 1)))


def grid_lines(marks: Sequence[float], half: float, count: int) -> list[float]:
    """Lines from end to end around the middle of the marks, evenly spread but for those moved onto the marks.

    A merge can lie in a valley that is narrower than a mesh; between two lines it would not be seen.
    """
    middle = (min(marks) + max(marks)) / 2
    lines = [middle + half * (2 * i / (count - 1) - 1) for i in range(count)]
    free = set(range(1, count - 1))
    for mark in sorted(set(marks)):
        if free:
            nearest = min(free, key=lambda i: abs(lines[i] - mark))
            lines[nearest] = mark
            free.remove(nearest)
    return sorted(lines)


@torch.inference_mode()
def losses(model: PreTrainedModel, held: HeldOut, batch_size: int = 64) -> dict[str, tuple[float, float]]:
    """By task the mean cross-entropy and the share of wrong answers, the task being known."""
    found = {}
    for task, columns in held.tasks.items():
        loss = wrong = count = 0.0
        for batch in columns.batches(batch_size):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels").flatten()
            logits = model(**batch, task=task).logits.flatten(0, -2).float()
            asked = labels != IGNORED
            loss += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            wrong += int((logits.argmax(-1) != labels)[asked].sum())
            count += int(asked.sum())
        found[task] = (loss / count, wrong / count)
    return found
