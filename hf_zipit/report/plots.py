"""Pictures, drawn with matplotlib without a display. Nothing is imported before something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from hf_zipit.evaluation.results import Accuracy
from hf_zipit.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_zipit.refit import RefitReport
    from hf_zipit.running.results import Row

# Okabe and Ito's colours, told apart by colour-blind readers too; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MAX_TASK_PANELS = 3
MAX_ROWS = 42

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.dpi": 110,
}

Measure = Callable[[Accuracy], "float | None"]


def accuracy_over_depth(rows: Sequence[Row], experts: Accuracy, title: str = "") -> Figure:
    """Accuracy over the share of merged blocks: a line per method, a panel per task and one for the joint accuracy.

    With more than three tasks their mean takes the place of the tasks. The experts are a dashed line.

    Args:
        rows: merges with their accuracies.
        experts: the accuracies of the experts side by side.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # a figure of its own: no display, no global state

    panels = _panels(experts)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 3.3 * len(panels), 3.9), layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (name, measure) in zip(axes, panels.items(), strict=True):
            _draw(axis, rows, experts, measure)
            axis.set_title(name, loc="left")
            axis.set_xlabel("depth (share of blocks merged)")
        axes[0].set_ylabel("test accuracy")
        lines, names = axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _panels(experts: Accuracy) -> dict[str, Measure]:
    """The measures to draw, by the panel's title."""
    tasks = list(experts.per_task)
    if len(tasks) <= MAX_TASK_PANELS:
        panels: dict[str, Measure] = {
            f"task {task!r}": lambda found, task=task: found.per_task[task] for task in tasks
        }
    else:
        panels = {f"mean of {len(tasks)} tasks": lambda found: found.mean}
    if experts.joint is not None:
        panels["joint, task unknown"] = lambda found: found.joint
    return panels


def _draw(axis: Axes, rows: Sequence[Row], experts: Accuracy, measure: Measure) -> None:
    methods = list(dict.fromkeys(row.method for row in rows))
    for index, method in enumerate(methods):
        points = sorted((row.depth, measure(row.accuracy)) for row in rows if row.method == method and row.accuracy)
        axis.plot(
            *zip(*points, strict=True),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5.5,
            linewidth=1.8,
            label=method,
            zorder=3 + index,
            clip_on=False,
        )
    axis.axhline(measure(experts), color="#333333", linestyle=(0, (5, 3)), linewidth=1.2, label="experts", zorder=2)
    axis.set_ylim(0, 1)
    axis.set_xticks(sorted({row.depth for row in rows}))
    axis.xaxis.set_major_formatter("{x:.2g}")
    axis.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axis.set_axisbelow(True)


def refit_errors(report: RefitReport, path: str | Path, title: str = "") -> Path:
    """Draw the refit's relative errors, module by module in the order they run, a marker per task, into a PNG file.

    Long models take several columns. The scale is linear: what is lost is where the markers are far to the right.

    Args:
        report: of a refit; `RefitReport.from_dict(model.config.method["refit_errors"])` for a merged model.
        path: of the file.
        title: of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(report.errors)
    columns = max(1, -(-len(names) // MAX_ROWS))
    rows = max(1, -(-len(names) // columns))
    labels = short_names(names)
    widest = max(map(len, labels), default=0)
    highest = max((error for by_task in report.errors.values() for error in by_task.values()), default=0.0)
    tasks = list(dict.fromkeys(task for by_task in report.errors.values() for task in by_task))
    with rc_context(STYLE):
        figure = Figure(figsize=((2.6 + 0.065 * widest) * columns, 1.5 + 0.19 * rows), layout="constrained")
        axes = figure.subplots(1, columns, sharex=True, squeeze=False)[0]
        for column, axis in enumerate(axes):
            part = slice(column * rows, (column + 1) * rows)
            _draw_errors(axis, [report.errors[name] for name in names[part]], labels[part], tasks)
            axis.set_ylim(rows - 0.4, -0.6)
            axis.set_xlim(0, highest * 1.06 or 1)
            axis.set_xlabel("squared error / variance of the target")
        lines, shown = axes[0].get_legend_handles_labels()
        figure.legend(lines, shown, loc="outside lower center", ncols=min(len(shown), 6) or 1, frameon=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        with replacing(Path(path)) as beside:
            figure.savefig(beside, format="png", dpi=130)
    return Path(path)


def _draw_errors(
    axis: Axes, errors: Sequence[Mapping[str, float]], labels: Sequence[str], tasks: Sequence[str]
) -> None:
    for row, by_task in enumerate(errors):
        if by_task:
            axis.plot([0, max(by_task.values())], [row, row], color="#D8D8D8", linewidth=1.2, zorder=1)
    for index, task in enumerate(tasks):
        points = [(by_task[task], row) for row, by_task in enumerate(errors) if task in by_task]
        axis.plot(
            *zip(*points, strict=True) if points else ([], []),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linestyle="none",
            label=task,
            zorder=3 + index,
            clip_on=False,
        )
    axis.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#E3E3E3", linewidth=0.8)
    axis.set_axisbelow(True)


def short_names(modules: Sequence[str]) -> list[str]:
    """Module paths without the part that all of them begin with."""
    shared = commonprefix([name.split(".")[:-1] for name in modules]) if len(modules) > 1 else []
    return [".".join(name.split(".")[len(shared) :]) for name in modules]
