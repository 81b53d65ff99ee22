"""The loss around two experts and their merge: on the line between the aligned experts, and in a plane with the merge.

Two experts that were trained apart lie in different basins; averaging their weights lands on the barrier between them.
Alignment brings expert b's units into a's places, and if the experts are the same up to a symmetry the barrier is gone
(Git Re-Basin, arXiv 2209.04836; for experts of different tasks MuDSC, CVPR 2024). Here the weights of the trunk are
moved and every task's loss is measured through that task's own branch, at its own entry.

*Aligned expert*: its trunk in the merged units, T M_t W_t U_t. One-to-one maps and changes of basis only move it: it
computes what the expert computes. Where units were joined (zip) it does not, and the ends of the line are what the
experts' weights become in merged units, not the experts themselves; `exact` tells.

*Barrier* of a task: the largest excess, on the line, of its loss over the straight line between the losses at the
ends. *Plane*: through both aligned experts and the merge, the axes orthogonal, in units of the experts' distance. An
average lies on the line between them; then the second axis is a seeded random direction, with the size of b - a
tensor by tensor (after Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_zipit.config import MergeConfig
from hf_zipit.data.held_out import Answers
from hf_zipit.errors import RecipeError
from hf_zipit.experts.loading import Experts
from hf_zipit.landscapes.results import Landscape
from hf_zipit.landscapes.survey import Survey
from hf_zipit.merging import plan, split_settings
from hf_zipit.observation.moments import Moments

METHOD = "weights"
"""How units are matched where nothing is said: without data, so that every sample can be measured on."""


def landscape(
    experts: Experts,
    calibration: Any,
    config: MergeConfig | None = None,
    *,
    validation: Any = None,
    pair: Sequence[str] | None = None,
    grid: int = 13,
    margin: float = 0.35,
    steps: int = 11,
    samples: int = 128,
    hold_out: float = 0.25,
    answers: Answers = "auto",
    moments: Moments | str | Path | None = None,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> Landscape:
    """Measure the loss around two experts and their merge.

    Args:
        experts: the models by task name, as for `merge`.
        calibration: a little data: one part is what the merge reads, if it needs data, another is measured on.
        config: of the merge; or its fields as keywords. By default units are matched by `weights`. Corrections belong
            to one point, not to a plane, and are left out. The refit pairs attention heads (`split_heads` is off):
            between models with different heads there is no line.
        pair: the tasks of the two experts; the first two by default.
        grid: points on each axis of the plane, 2 or more; 0 for no plane. Every point runs all samples once.
        margin: how far the plane goes beyond the points, in distances of the experts.
        steps: points on the line, 3 or more; an odd number includes the middle.
        samples: of each task, at most, that are measured on.
        validation, hold_out, answers, moments: of the samples that are measured on: see `hf_zipit.search`.
        accelerator: where the experts are observed; the losses are measured where `merge` leaves the model.
        settings: fields of `MergeConfig`, and `processor`, `columns` and `batch_size` of `Calibration`.

    Raises:
        ExpertError: if the experts do not fit each other, or their aligned trunks are the same.
        DataError, RecipeError, SpecError: as `merge` and `search` do.
    """
    if steps < 3 or grid < 0 or grid == 1 or samples < 1:
        raise RecipeError(
            f"steps is {steps}, grid {grid} and samples {samples}; they must be at least 3, 2 (or 0: no plane) and 1."
        )
    reading, settings = split_settings(settings)
    if config is None and "method" not in settings:
        settings["method"] = METHOD
    config = MergeConfig.of(config, **settings, corrections=())
    survey = Survey.of(
        experts, calibration, validation, samples=samples, hold_out=hold_out, answers=answers, seed=config.seed,
        moments=moments, accelerator=accelerator, **reading,
    )  # fmt: skip
    chosen = survey.pair(pair)
    surface = survey.surface(chosen, config)
    aligned = survey.curve(surface, steps)
    plane = survey.plane(surface, grid, margin) if grid else None
    naive = None
    if surface.method != "identity":
        plain = MergeConfig(method="identity", depth=config.depth, seed=config.seed)
        naive = survey.curve(survey.surface(chosen, plain), steps)
    return Landscape(
        chosen, plan(survey.experts, config).config.name, surface.depth, survey.held.answers, survey.held.counts,
        aligned, naive, plane
    )  # fmt: skip
