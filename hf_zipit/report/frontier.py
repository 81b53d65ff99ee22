"""What a search found, as a table for the terminal and as a picture: score against parameters and computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from hf_zipit.extras import installed
from hf_zipit.files import write_json, write_text
from hf_zipit.recipe.sections import Recipe
from hf_zipit.report.plots import add_legend, add_title, drawing, look, save_picture, wrapped
from hf_zipit.report.tables import EXPERTS, accuracies, depth_cell, held_out_samples, new_table, share
from hf_zipit.searching.result import SearchResult, Trial, with_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS, PICTURE, BEST = "search.json", "frontier.png", "best.yaml"

REST = 12
"""The table shows at most this many of the beaten trials, the best first."""


def save_search(result: SearchResult, folder: str | Path, *, recipe: Recipe | None = None, title: str = "") -> Path:
    """The folder, with all trials (`search.json`), the picture of the frontier and, if told the recipe, the best one.

    Files of an earlier search are replaced. The recipe whose experts and data were searched becomes, with the best
    setting, `best.yaml`, which `hf-zipit run` takes.

    Raises:
        OutputError: if the folder cannot be written.
        RecipeError: if no merge succeeded and there is nothing to write a recipe of.
    """
    folder = Path(folder)
    write_json(folder / RESULTS, result.to_dict())
    if installed("matplotlib"):
        save_picture(frontier_picture(result, title=title), folder / PICTURE)
    if recipe is not None:
        write_text(folder / BEST, with_setting(recipe, result.best.setting).to_yaml())
    return folder


def search_table(result: SearchResult, title: str = "") -> Table:
    """The frontier, marked, with the best trial; below it the best of the others and those that failed."""
    tasks = list(result.experts.per_task) if result.experts else []
    measures = [*tasks, "mean", "joint"] if tasks else ["score"]
    table = new_table(title, ["", "method", "settings"], ["depth", *measures, "size", "MACs", "seconds"])
    if result.experts:
        count = len(tasks)
        beside = [*accuracies(result.experts), f"{count:.2f}", f"{count:.2f}", "-"]
        table.add_row("", EXPERTS, "", "-", *beside, style="dim", end_section=True)
    kept, scored = result.frontier, [trial for trial in result.trials if trial.score is not None]
    for trial in kept:
        best = "best" if len(scored) > 1 else "only"  # one alone was compared with nothing
        table.add_row(best if trial is result.best_or_none else "frontier", *_cells(trial, result))
    table.add_section()
    beaten = sorted((t for t in result.trials if t.score is not None and t not in kept), key=lambda t: -t.score)
    for trial in beaten[:REST]:
        table.add_row("", *_cells(trial, result), style="dim")
    return table


def search_notes(result: SearchResult) -> list[str]:
    """What the table does not say: how the score was taken, how many trials are left out, which merges failed."""
    right = {"labels": "their labels", "experts": "the answers of each task's expert"}
    notes = (
        [f"Scores: on {held_out_samples(result.samples)}, right by {right[result.answers]}."] if result.answers else []
    )
    scored = [trial for trial in result.trials if trial.score is not None]
    if len(scored) == 1:
        notes.append(
            "A single merge has a score, so that nothing was chosen; name several methods, depths or options."
        )
    if (best := result.best_or_none) is not None and best.accuracy is not None:
        told = f"mean accuracy of so many samples is known to about ±{best.accuracy.margin:.3f} (95 %)"
        notes.append(f"A {told}: {'treat it so' if len(scored) == 1 else 'merges nearer than that are level'}.")
    notes.append("size and MACs: in experts, for the answers of all tasks.")
    failed = [trial for trial in result.trials if trial.error]
    left_out = len(result.trials) - len(failed) - len(result.frontier) - REST
    if left_out > 0:
        notes.append(f"{left_out} more merges are beaten and not shown.")
    return [*notes, *(f"Failed: {trial.setting}: {trial.error}" for trial in failed)]


def _cells(trial: Trial, result: SearchResult) -> list[str]:
    measured = accuracies(trial.accuracy) if trial.accuracy else [share(trial.score)]
    size, macs = trial.parameters / result.expert_parameters, trial.macs / max(result.expert_macs, 1)
    return [
        trial.setting.method, trial.setting.details(), depth_cell(trial.setting.depth), *measured,
        f"{size:.2f}", f"{macs:.2f}", f"{trial.seconds:.1f}",
    ]  # fmt: skip


def frontier_picture(result: SearchResult, title: str = "") -> Figure:
    """Two panels: the score over the size and over the computation of every merge, in experts.

    A method has one colour and marker; what is beaten in score, size and computation is pale. A panel's line is the
    best score that its size or its computation buys. The experts side by side are the star.
    """
    panels: dict[str, Callable[[Trial], float]] = {
        "parameters (one expert = 1)": lambda trial: trial.parameters / result.expert_parameters,
        "multiply-accumulates (one expert = 1)": lambda trial: trial.macs / max(result.expert_macs, 1),
    }
    methods = list(dict.fromkeys(trial.setting.method for trial in result.trials if trial.score is not None))
    with drawing(9.4, 4.3, **{"axes.grid.axis": "both"}) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (label, cost) in zip(axes, panels.items(), strict=True):
            _draw(axis, result, methods, cost)
            axis.set_xlabel(label)
        axes[0].set_ylabel(wrapped(_score_name(result), 2.8))
        add_legend(figure, axes[0])
        scored = f", scored on {held_out_samples(result.samples)}" if result.samples else ""
        told = f"{len(result.trials)} merges{scored}"
        add_title(figure, f"{title}: {told}" if title else told, 11)
    return figure


def _score_name(result: SearchResult) -> str:
    if result.measure == "own":
        return "score"
    kind = "per-task mean" if result.measure == "mean" else "joint"
    against = "accuracy" if result.answers == "labels" else "agreement with the experts"
    return f"held-out {against}, {kind}"


def staircase(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, score) those that score more than every cheaper one, from cheap to dear."""
    kept: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or score > kept[-1][1]:
            kept.append((cost, score))
    return kept


def _draw(axis: Axes, result: SearchResult, methods: Sequence[str], cost: Callable[[Trial], float]) -> None:
    kept = result.frontier
    scored = [(cost(trial), trial.score) for trial in result.trials if trial.score is not None]
    line = staircase(scored)
    if line:
        line.append((max(scored)[0], line[-1][1]))  # what costs more than the best need not score less
        style = {"color": "#555555", "linewidth": 1.3, "drawstyle": "steps-post", "zorder": 2}
        axis.plot(*zip(*line, strict=True), label="best for the cost", **style)
    for index, method in enumerate(methods):
        style = {**look(index), "linestyle": "none"}
        for trials, alpha, size, label in (
            ([t for t in result.trials if t.score is not None and t not in kept], 0.28, 5.0, None),
            (kept, 1.0, 7.0, None),
            ([], 1.0, 6.0, method),
        ):
            points = [(cost(trial), trial.score) for trial in trials if trial.setting.method == method]
            columns = zip(*points, strict=True) if points else ([], [])
            axis.plot(*columns, alpha=alpha, markersize=size, label=label, zorder=3 + index, **style)
    if result.experts:
        mean = result.experts.mean if result.measure == "mean" else result.experts.joint
        tasks = len(result.experts.per_task)
        axis.plot(
            [tasks], [mean], "*", color="#333333", markersize=12, markeredgecolor="white", zorder=4 + len(methods),
            label=EXPERTS,
        )  # fmt: skip
    if len(scored) > len(kept):
        axis.plot([], [], "o", color="#333333", alpha=0.28, markersize=5, label="pale: beaten")
    if best := result.best_or_none:
        style = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": "#222222"}
        axis.annotate("best", (cost(best), best.score), xytext=(0, 7), **style)
    axis.margins(x=0.08, y=0.12)
