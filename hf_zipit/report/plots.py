"""Pictures, drawn with matplotlib without a display. Nothing is imported before something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hf_zipit.evaluation import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_zipit.running import Row

# Okabe and Ito's colours, told apart by colour-blind readers too; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MAX_TASK_PANELS = 3

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
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axis.set_axisbelow(True)
