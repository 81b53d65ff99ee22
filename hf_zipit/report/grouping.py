"""What experts lose with each other as a table and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from hf_zipit.grouping.grouping import Grouping
from hf_zipit.report.plots import add_title, drawing, wrapped
from hf_zipit.report.tables import measured_on, new_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.9  # inches


def grouping_table(found: Grouping, title: str = "") -> Table:
    """A line for every task: what it loses with each of the others, and is expected to lose in its group."""
    table = new_table(title, ["group", "task"], [*(f"with {task}" for task in found.loses), "in its group"])
    for number, members in enumerate(found.groups, 1):
        for task in members:
            cells = [f"{found.loses[task][other]:+.3f}" if other != task else "" for other in found.loses]
            table.add_row(str(number), task, *cells, f"{found.expected(task):+.3f}")
        table.add_section()
    table.caption = f"by how much the loss of a task rises (nats); {_measured(found)}"
    table.caption_justify = "left"
    return table


def disturbance(found: Grouping, title: str = "") -> Figure:
    """The matrix of what tasks lose with each other, in the order of the groups, which are framed."""
    from matplotlib.patches import Rectangle

    tasks = [task for members in found.groups for task in members]
    worst = max((abs(value) for own in found.loses.values() for value in own.values()), default=0) or 1
    side = CELL * len(tasks)
    with drawing(side + 2.6, side + 1.7, **{"axes.grid": False}) as figure:
        axis = figure.subplots()
        rows = [[found.loses[task].get(other, float("nan")) for other in tasks] for task in tasks]
        image = axis.imshow(rows, cmap="PuOr_r", vmin=-worst, vmax=worst)
        names = [wrapped(task, CELL, 9) for task in tasks]
        axis.set_xticks(range(len(tasks)), labels=names, fontsize=9)
        axis.set_yticks(range(len(tasks)), labels=names, fontsize=9)
        axis.tick_params(length=0)
        axis.set_xlabel("merged with")
        axis.set_ylabel("the task loses")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if x != y:
                    dark = abs(value) > 0.6 * worst
                    axis.text(
                        x, y, f"{value:+.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "black"
                    )
        first = 0
        for members in found.groups:
            axis.add_patch(
                Rectangle((first - 0.5, first - 0.5), len(members), len(members), fill=False, linewidth=2.2, zorder=5)
            )
            first += len(members)
        bar = figure.colorbar(image, ax=axis, shrink=0.7, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)
        bar.set_label("rise of the loss, nats", fontsize=9)
        add_title(figure, f"{title}: {_measured(found)}" if title else _measured(found), 11)
    return figure


def _measured(found: Grouping) -> str:
    """Which merges, on which data."""
    return f"pairs merged by {found.method}; {measured_on(found.samples, found.answers)}"
