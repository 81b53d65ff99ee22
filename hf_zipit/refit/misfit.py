"""How far a solved site's output is from its target, for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_zipit.refit.fit import Fit
from hf_zipit.refit.graph import Site
from hf_zipit.refit.rows import at_rows
from hf_zipit.refit.store import MERGED

UNKNOWN_TASK = "unknown task"
"""What a report calls samples of which nobody said the task."""


def relative_errors(fit: Fit, site: Site) -> dict[str, float]:
    """The squared error on every task's samples, as a share of the target's spread there."""
    kinds = [*fit.tasks, UNKNOWN_TASK]
    found = zip(kinds, *misfit(fit, site), strict=True)
    return {kind: float(off / spread.clamp_min(1e-12)) for kind, off, spread in found if spread > 0}


def misfit(fit: Fit, site: Site) -> tuple[Tensor, Tensor]:
    """What a site's output lacks, now that it was run with its weights.

    Returns:
        The weighted squared error and the weighted squared deviation of the target from its mean, both `[T + 1]`: for
        samples of each task and, last, of unknown ones. For a writer into a residual stream, those of the stream.
    """
    width = fit.values.merged[site.weight].shape[site.unit_axis]
    sums = torch.zeros(len(fit.tasks) + 1, width + 3, dtype=torch.float64)
    for b, batch in enumerate(fit.values.batches):
        made = _made(fit, site, b)
        rows, weight = fit.pick(site, b)
        y = fit.targets.reached(site, b, rows)
        off = at_rows(made, site.channel_axis, rows) - y
        squares = [torch.linalg.vector_norm(part, dim=1).square() for part in (off, y)]
        ones = torch.ones(len(y))
        scalars = torch.stack([(weight * part).sum(dtype=torch.float64) for part in (*squares, ones)])
        task = len(fit.tasks) if batch.task is None else batch.task
        sums[task] += torch.cat([scalars, (weight @ y).double()])
    sums = fit.all_reduce(sums)
    off, square, rows = sums[:, :3].T
    spread = square - sums[:, 3:].square().sum(1) / rows.clamp_min(1e-12)
    return off, torch.where(spread > 1e-6 * square, spread, 0.0)  # below it is rounding


def _made(fit: Fit, site: Site, b: int) -> Tensor:
    """The merged model's value where a site is measured."""
    made = fit.values.of(site.output, MERGED, b)
    if site.stream is None or site.stream is site.node:
        return made
    return made + fit.values.of(site.other, MERGED, b)
