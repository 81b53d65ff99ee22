"""Pictures, drawn with matplotlib without a display. Nothing is imported before something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hf_zipit.errors import OutputError
from hf_zipit.evaluation.results import Accuracies, Measurement
from hf_zipit.extras import require
from hf_zipit.files import replacing
from hf_zipit.refit import RefitReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; markers tell them apart in grey. See `look`.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KINDS = ("png", "svg", "pdf")
MARKERS = "osD^vPX"
MAX_TASK_PANELS = 3
MAX_ROWS = 42
MAX_TICKS = 6
PANEL = 3.3  # inches

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
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
}

Measure = Callable[[Accuracies], "float | None"]

LETTER = 0.62
"""The mean width of a letter over the font's size, rounded up."""

LINE = 1.6 / 72
"""The height of a line in inches over the font's size in points."""


@contextmanager
def drawing(width: float, height: float, **style: Any) -> Iterator[Figure]:
    """An empty figure, in inches, and the style that is drawn in; `style` is what differs from `STYLE`."""
    require("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # a figure of its own: no display, no global state

    with rc_context({**STYLE, **style}):
        yield Figure(figsize=(width, height), layout="constrained")


def save_picture(figure: Figure, path: Path) -> Path:
    """A picture as a file of the kind that its name ends in, whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format=picture_kind(path), dpi=140)
    return path


def picture_kind(path: Path) -> str:
    """`png`, `svg` or `pdf`; raises OutputError for a name that ends otherwise."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise OutputError(f"The picture {path} should end in {', '.join(f'.{known}' for known in KINDS)}.")
    return kind


def look(index: int) -> dict[str, str]:
    """Colour and marker of the `index`-th thing of a picture: the colours come again after 7, with other markers."""
    again, colour = divmod(index, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[(colour + again) % len(MARKERS)]}


def wrapped(text: str, inches: float, size: float = 10) -> str:
    """A text in as many lines as it needs where `inches` are free, in a font of `size` points."""
    return fill(text, max(8, int(72 * inches / (LETTER * size))))


def add_title(figure: Figure, text: str, size: float = 12) -> None:
    """A title on the left above all panels, in lines that fit; the figure grows by those after the first."""
    if not text:
        return
    lines = wrapped(text, figure.get_figwidth() - 0.2, size)
    figure.suptitle(lines, x=0.01, ha="left", fontsize=size)
    figure.set_figheight(figure.get_figheight() + lines.count("\n") * LINE * size)


def add_legend(figure: Figure, axis: Axes) -> None:
    """What an axis shows, below all panels, in as many columns as fit; the figure grows by the lines it needs."""
    lines, names = axis.get_legend_handles_labels()
    if names:
        column = 0.7 + LETTER * 10 / 72 * max(map(len, names))  # a sample of the line and space come before the name
        columns = min(len(names), max(1, int(figure.get_figwidth() / column)))
        figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False)
        figure.set_figheight(figure.get_figheight() + (-(-len(names) // columns) - 1) * LINE * 10)


@contextmanager
def panels(
    names: Sequence[str], across: str, up: str, *, title: str = "", width: float = PANEL, height: float = 3.9
) -> Iterator[list[Axes]]:
    """A figure's panels side by side, with one scale, and one legend below; of each its name and what goes across."""
    with drawing(1.2 + width * len(names), height) as figure:
        axes = list(figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0])
        yield axes
        for axis, name in zip(axes, names, strict=True):
            axis.set_title(name, loc="left")
            axis.set_xlabel(across)
        axes[0].set_ylabel(up)
        add_legend(figure, axes[0])
        add_title(figure, title)


def accuracy_over_depth(rows: Sequence[Measurement], experts: Accuracies, title: str = "") -> Figure:
    """Accuracy over the share of merged blocks: a line per method, a panel per task and one for the joint accuracy.

    With more than three tasks their mean takes the place of the tasks. The experts, side by side, are a dashed line.
    """
    measures = _panels(experts)
    names = [wrapped(name, PANEL, 12) for name in measures]
    with panels(names, "depth (share of blocks merged)", "accuracy", title=title) as axes:
        for axis, measure in zip(axes, measures.values(), strict=True):
            _draw(axis, rows, experts, measure)
    return axes[0].figure


def kept_picture(merged: Accuracies, experts: Accuracies) -> Figure:
    """What a merged model keeps: for every task a bar of its expert's accuracy, and one of the model's over it."""
    tasks = list(merged.per_task)
    labels = [wrapped(task, 1.6) for task in tasks]
    with drawing(6.4, 1.3 + 0.45 * len(tasks), **{"axes.grid.axis": "x"}) as figure:
        axis = figure.subplots()
        places = range(len(tasks))
        axis.barh(places, [experts.per_task[task] for task in tasks], 0.8, color="#D8D8D8", label="expert")
        own = [merged.per_task[task] for task in tasks]
        axis.barh(places, own, 0.45, color=COLOURS[0], label="this model", zorder=3)
        for place, task in enumerate(tasks):
            if experts.per_task[task]:
                told = f"{100 * merged.per_task[task] / experts.per_task[task]:.1f} %"
                axis.text(1.02, place, told, va="center", fontsize=10)
        axis.set_yticks(places, labels)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("accuracy; on the right the share of the expert's")
        add_legend(figure, axis)
    return figure


def _panels(experts: Accuracies) -> dict[str, Measure]:
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


def _draw(axis: Axes, rows: Sequence[Measurement], experts: Accuracies, measure: Measure) -> None:
    from matplotlib.ticker import FixedLocator

    methods = list(dict.fromkeys(row.method for row in rows))
    for index, method in enumerate(methods):
        points = sorted((row.depth, measure(row.accuracy)) for row in rows if row.method == method and row.accuracy)
        line = {**look(index), "markersize": 5.5, "linewidth": 1.8, "zorder": 3 + index, "clip_on": False}
        axis.plot(*zip(*points, strict=True), label=method, **line)
    axis.axhline(measure(experts), color="#333333", linestyle=(0, (5, 3)), linewidth=1.2, label="experts", zorder=2)
    axis.set_ylim(0, 1)
    axis.xaxis.set_major_locator(FixedLocator(sorted({row.depth for row in rows}), nbins=MAX_TICKS))
    axis.xaxis.set_major_formatter("{x:.2g}")


def refit_picture(report: RefitReport, title: str = "") -> Figure:
    """The refit's relative errors, module by module in the order they run, a marker per task.

    Long models take several columns. The scale is linear: what is lost is where the markers are far to the right.
    """
    names = list(report.errors)
    columns = max(1, -(-len(names) // MAX_ROWS))
    rows = max(1, -(-len(names) // columns))
    labels = short_names(names)
    widest = max(map(len, labels), default=0)
    highest = max((error for by_task in report.errors.values() for error in by_task.values()), default=0.0)
    tasks = list(dict.fromkeys(task for by_task in report.errors.values() for task in by_task))
    with drawing((2.6 + 0.065 * widest) * columns, 1.5 + 0.19 * rows, **{"axes.grid.axis": "x"}) as figure:
        axes = figure.subplots(1, columns, sharex=True, squeeze=False)[0]
        for column, axis in enumerate(axes):
            part = slice(column * rows, (column + 1) * rows)
            _draw_errors(axis, [report.errors[name] for name in names[part]], labels[part], tasks)
            axis.set_ylim(rows - 0.4, -0.6)
            axis.set_xlim(0, highest * 1.06 or 1)
            axis.set_xlabel("squared error / variance of the target")
        add_legend(figure, axes[0])
        add_title(figure, title)
    return figure


def _draw_errors(
    axis: Axes, errors: Sequence[Mapping[str, float]], labels: Sequence[str], tasks: Sequence[str]
) -> None:
    for row, by_task in enumerate(errors):
        if by_task:
            axis.plot([0, max(by_task.values())], [row, row], color="#D8D8D8", linewidth=1.2, zorder=1)
    for index, task in enumerate(tasks):
        points = [(by_task[task], row) for row, by_task in enumerate(errors) if task in by_task]
        line = {**look(index), "markersize": 4.5, "linestyle": "none", "zorder": 3 + index, "clip_on": False}
        axis.plot(*zip(*points, strict=True) if points else ([], []), label=task, **line)
    axis.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axis.tick_params(axis="y", length=0)


def short_names(modules: Sequence[str]) -> list[str]:
    """Module paths without the part that all of them begin with."""
    shared = commonprefix([name.split(".")[:-1] for name in modules]) if len(modules) > 1 else []
    return [".".join(name.split(".")[len(shared) :]) for name in modules]
