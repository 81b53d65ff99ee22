"""Pictures of the loss around two experts: contours in a plane, one panel a task, and curves on the line between them.

Losses rise over orders of magnitude away from the experts, so contours and colours are even in the logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from hf_zipit.files import write_json
from hf_zipit.landscapes.results import Curve, Landscape, Plane
from hf_zipit.report.plots import MARKERS, add_legend, add_title, drawing, look, save_picture, wrapped
from hf_zipit.report.tables import measured_on, new_table, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS, CONTOURS, CURVES = "landscape.json", "landscape.png", "interpolation.png"

LEVELS = 14
FLOOR = 1e-3
"""Losses below this are drawn as this: a logarithm has no zero."""

JOINED = " (units joined: the ends are not the experts)"

WIDTH = 3.6  # inches of a panel


def save_landscape(found: Landscape, folder: str | Path, *, title: str = "") -> Path:
    """The folder, with the numbers (`landscape.json`), the curves (`interpolation.png`) and, given a plane, the
    contours (`landscape.png`). Raises OutputError if it cannot be written.
    """
    folder = Path(folder)
    write_json(folder / RESULTS, found.to_dict())
    pictures = {CURVES: interpolation} | ({CONTOURS: contours} if found.plane else {})
    for name, draw in pictures.items():
        save_picture(draw(found, title=title), folder / name)
    return folder


def contours(found: Landscape, title: str = "") -> Figure:
    """The loss of every task in the plane through the aligned experts and the merge."""
    plane = found.plane
    tasks = list(plane.loss)
    with drawing(0.6 + (WIDTH + 0.7) * len(tasks), WIDTH + 1.4, **{"axes.grid": False}) as figure:
        figure.get_layout_engine().set(h_pad=0.1)
        axes = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
        for axis, task in zip(axes, tasks, strict=True):
            filled = _contour(axis, plane, task)
            bar = figure.colorbar(filled, ax=axis, shrink=0.82, pad=0.02)
            _ticks(bar, filled.levels)
            _points(axis, plane, found)
            axis.set_title(wrapped(f"loss of {task!r}", WIDTH, 12), loc="left")
            axis.set_aspect("equal")
        _labels(figure, axes, plane, found)
        add_title(figure, _title(found, title), 11)
    return figure


def _contour(axis: Axes, plane: Plane, task: str) -> object:
    from matplotlib.colors import LogNorm

    loss = np.nan_to_num(np.asarray(plane.loss[task], dtype=float), nan=np.inf)
    top = np.max(loss[np.isfinite(loss)], initial=FLOOR)
    loss = np.clip(loss, FLOOR, max(top, 2 * FLOOR))
    low, high = float(loss.min()), float(loss.max())
    levels = np.geomspace(low, max(high, low * 1.01), LEVELS)
    norm = LogNorm(levels[0], levels[-1])
    filled = axis.contourf(plane.x, plane.y, loss, levels=levels, norm=norm, cmap="viridis_r", extend="both")
    axis.contour(plane.x, plane.y, loss, levels=levels, colors="white", linewidths=0.5, alpha=0.6)
    return filled


def _ticks(bar: object, levels: Sequence[float]) -> None:
    """Every third level as a plain number."""
    shown = list(levels)[::3]
    bar.minorticks_off()
    bar.set_ticks(shown, labels=[f"{level:.2g}" for level in shown])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)


def _points(axis: Axes, plane: Plane, found: Landscape) -> None:
    """The experts and the merge, named beside their marks, away from each other."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    for index, (name, (x, y)) in enumerate(plane.points.items()):
        hollow = not found.aligned.exact and name in found.pair
        axis.plot(
            [x], [y], marker="*" if name == "merge" else MARKERS[index], markersize=13 if name == "merge" else 8,
            color="white" if hollow else "black", markeredgecolor="black" if hollow else "white",
            markeredgewidth=1.2, linestyle="none", zorder=5, clip_on=False,
        )  # fmt: skip
        above = name == "merge"
        axis.annotate(
            wrapped(name, WIDTH / 3, 9), (x, y), xytext=(0, 10 if above else -8), textcoords="offset points",
            ha="center", va="bottom" if above else "top", fontsize=9, color="black", path_effects=halo, zorder=6,
        )  # fmt: skip


def _labels(figure: Figure, axes: Sequence[Axes], plane: Plane, found: Landscape) -> None:
    a, b = found.pair
    for axis in axes:
        axis.set_xlabel(wrapped(f"from {a!r} to {b!r}", WIDTH))
    axes[0].set_ylabel("towards the merge" if plane.through_merge else "a random direction")
    notes = ["Loss: cross-entropy in nats. Axes: in distances of the aligned experts."]
    if not plane.through_merge:
        notes.append("The merge is on the line between them.")
    if not found.aligned.exact:
        notes.append("Hollow marks: the experts' weights in merged units, which are not one-to-one with their own.")
    figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=8.5, color="#555555")


def interpolation(found: Landscape, title: str = "") -> Figure:
    """Loss and error of every task on the line between the experts, aligned and as they are, with the barriers."""
    tasks = list(found.aligned.loss)
    with drawing(1.0 + WIDTH * len(tasks), 6.2) as figure:
        rows = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
        for column, task in enumerate(tasks):
            for index, curve in enumerate(found.curves):
                _curve(rows[0][column], curve, curve.loss[task], index)
                _curve(rows[1][column], curve, curve.error[task], index)
            told = [f"barrier {curve.barrier(task):.2f}, {line_name(curve)}" for curve in found.curves]
            top = rows[0][column]
            top.set_title(wrapped(f"task {task!r}", WIDTH, 12), loc="left", pad=8 + 11 * len(told))
            top.text(0, 1.02, "\n".join(told), transform=top.transAxes, fontsize=8, color="#555555", va="bottom")
            rows[1][column].set_xlabel("place on the line")
            ends = (wrapped(name, WIDTH / 3.5) for name in found.pair)
            rows[1][column].set_xticks([0, 0.5, 1], labels=[next(ends), "middle", next(ends)])
        rows[0][0].set_ylim(bottom=0)
        rows[1][0].set_ylim(0, 1)
        rows[0][0].set_ylabel("loss (cross-entropy, nats)")
        rows[1][0].set_ylabel("error (share of wrong answers)")
        add_legend(figure, rows[0][0])
        add_title(figure, _title(found, title), 11)
    return figure


def line_name(curve: Curve) -> str:
    """What the line of a curve runs between."""
    return "experts as they are" if curve.method == "identity" else f"aligned by {curve.method}"


def _curve(axis: Axes, curve: Curve, values: Sequence[float], index: int) -> None:
    label = line_name(curve) + ("" if curve.exact else JOINED)
    axis.plot(
        curve.at, values, **look(index), markersize=4.5, linewidth=1.8, linestyle="-" if curve.exact else "--",
        label=label, zorder=3 + index, clip_on=False,
    )  # fmt: skip


def _title(found: Landscape, title: str) -> str:
    """What is shown, of which merge, on which data."""
    merge = f"{found.method}, depth {found.depth:g}; {measured_on(found.samples, found.answers)}"
    return f"{title}: {merge}" if title else merge


def barriers_table(found: Landscape, title: str = "") -> Table:
    """A line for each way to bring the experts together: what it costs in the middle, and the barriers."""
    tasks = list(found.aligned.loss)
    barriers, middles = ([f"{kind} {task}" for task in tasks] for kind in ("barrier", "middle"))
    table = new_table(title, ["line between"], [*barriers, "of the mean", *middles])
    for curve in found.curves:
        middle = min(range(len(curve.at)), key=lambda i: abs(curve.at[i] - 0.5))
        barriers = [f"{curve.barrier(task):.3f}" for task in tasks]
        right = [share(1 - curve.error[task][middle]) for task in tasks]
        table.add_row(line_name(curve), *barriers, f"{curve.mean_barrier:.3f}", *right)
    table.caption = "barrier: excess of the loss over the line between the ends; middle: accuracy half-way"
    table.caption_justify = "left"
    return table
