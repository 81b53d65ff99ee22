"""Experts, the data their merges read and the samples that losses are measured on, and the measuring itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_zipit.align.stage import align_trunk
from hf_zipit.config import MergeConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.data.held_out import Answers, HeldOut, held_out, limit, read_divided
from hf_zipit.errors import RecipeError
from hf_zipit.evaluation.losses import losses
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.landscapes.results import Curve, Losses, Plane
from hf_zipit.landscapes.surface import Surface, make_surface
from hf_zipit.merging import merge, plan
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.shared import SharedMoments, moments_for
from hf_zipit.registry import suggestion


@dataclass(frozen=True, eq=False)
class Survey:
    """Experts, the data that merges may read, and the samples that losses are measured on."""

    experts: Mapping[str, PreTrainedModel]
    calibration: Calibration
    held: HeldOut
    moments: Moments | str | Path | None = None
    seed: int = 0
    _shared: dict[float | str, SharedMoments] = field(default_factory=dict)

    @classmethod
    def of(
        cls, experts: Experts, calibration: Any, validation: Any = None, *, samples: int = 128,
        hold_out: float = 0.25, answers: Answers = "auto", seed: int = 0, moments: Moments | str | Path | None = None,
        **reading: Any,
    ) -> Survey:  # fmt: skip
        """Load the experts and divide the data; `reading` are settings of `Calibration`. See `landscape`."""
        loaded = load_experts(experts)
        data, part = read_divided(calibration, validation, loaded, hold_out, seed, **reading)
        return cls(loaded, data, held_out(limit(part, samples, seed), loaded, answers=answers), moments, seed)

    def pair(self, wanted: Sequence[str] | None) -> tuple[str, str]:
        """The tasks of two experts, the first two by default."""
        tasks = list(self.experts)
        chosen = tuple(wanted or tasks[:2])
        if unknown := [task for task in chosen if task not in tasks]:
            raise RecipeError(f"There is no expert {unknown[0]!r}; {suggestion(unknown[0], tasks)}")
        if len(set(chosen)) != 2 or len(chosen) != 2:
            raise RecipeError(f"A line runs between two different experts, not between {list(chosen)}.")
        return chosen

    def surface(self, pair: tuple[str, str], config: MergeConfig) -> Surface:
        """Merge, and lay the plane through two experts."""
        config = plan(self.experts, config).config  # with what an automatic method chooses
        if config.refit is not None:  # between models with different heads there is no line
            config = replace(config, refit=replace(config.refit, split_heads=False))
        planned = plan(self.experts, config)
        if not planned.cut.trunk:
            raise RecipeError("At this depth nothing is shared, so that there is nothing to move; take a larger one.")
        shared = self._shared.setdefault(
            config.depth, SharedMoments(self.experts, self.calibration, [config.depth], self.moments)
        )
        found = shared.moments(planned)
        maps = align_trunk(planned, None if found is None else moments_for(planned, None, found))
        merged = merge(self.experts, self.calibration, config, moments=found)
        return make_surface(planned, maps, merged, pair, seed=self.seed)

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
        size = self.calibration.batch_size
        found = [losses(surface.move(*at), self.held, size) for at in tqdm(points, desc=what, unit="point")]
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
