"""Results, plans and specs as tables for the terminal, on `rich`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from hf_zipit.evaluation.results import Accuracies, Measurement, Scores
from hf_zipit.planning.plan import Plan

EXPERTS = "experts side by side"


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table: columns of words on the left, of numbers on the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name, overflow="fold", min_width=min(len(name), 12))
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def share(value: float | None) -> str:
    """An accuracy with three digits: `.957`."""
    return "-" if value is None else f"{value:.3f}".removeprefix("0")


def accuracies(found: Accuracies) -> list[str]:
    """The accuracies of one model: each task, their mean, joint."""
    return [*(share(value) for value in found.per_task.values()), share(found.mean), share(found.joint)]


def results_table(
    rows: Iterable[Measurement], experts: Accuracies | None, expert_parameters: int, title: str = ""
) -> Table:
    """A line for every merge, below a line for the experts."""
    tasks = list(experts.per_task) if experts else []
    measures = [*tasks, "mean", "joint"] if experts else []
    table = new_table(title, ["method"], ["depth", *measures, "parameters", "seconds"])
    if experts:
        table.add_row(EXPERTS, "-", *accuracies(experts), f"{expert_parameters:,}", "-", style="dim", end_section=True)
    last = None
    for row in rows:
        if last not in (None, row.method):
            table.add_section()
        last = row.method
        measured = accuracies(row.accuracy) if row.accuracy else []
        table.add_row(row.method, f"{row.depth:.2f}", *measured, f"{row.parameters:,}", f"{row.seconds:.1f}")
    return table


def accuracy_table(models: Mapping[str, Accuracies], title: str = "") -> Table:
    """A line for every model."""
    tasks = list(next(iter(models.values())).per_task)
    table = new_table(title, ["model"], [*tasks, "mean", "joint"])
    for name, found in models.items():
        table.add_row(name, *accuracies(found))
    return table


def scores_table(models: Mapping[str, Scores], title: str = "") -> Table:
    """A line for every metric and model, a column for every task."""
    tasks, lines = score_lines(models)
    table = new_table(title, ["metric", "model"], tasks)
    for line in lines:
        table.add_row(*line)
    return table


def score_lines(models: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """The tasks, and for every metric a line for each model: metric, model, the value for each task."""
    tasks = list(dict.fromkeys(task for scores in models.values() for task in scores))
    names = dict.fromkeys(name for scores in models.values() for found in scores.values() for name in found)
    values = {model: [scores.get(task, {}) for task in tasks] for model, scores in models.items() if scores}
    return tasks, [
        [name, model, *(f"{found[name]:.4g}" if name in found else "-" for found in by_task)]
        for name in names
        for model, by_task in values.items()
    ]


def spaces_table(rows: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """The spaces of a model; see `hf_zipit.symmetry.summary.space_rows`."""
    table = new_table(title, ["space", "symmetry", "fixed by"], ["heads", "size", "parameters"])
    table.columns[0].no_wrap = True
    for row in rows:
        fixed = row["symmetry"] == "fixed"
        table.add_row(
            row["name"],
            row["symmetry"],
            row["frozen_by"] or "",
            f"{row['heads']:,}" if row["heads"] else "",
            f"{row['size']:,}",
            f"{row['parameters']:,}",
            style="dim" if fixed else None,
        )
    return table


def plans_table(plans: Mapping[tuple[str, float | str], Plan], title: str = "") -> Table:
    """What every merge of a recipe would do."""
    table = new_table(
        title,
        ["method", "cut"],
        ["trunk", "branches", "merged", "of experts", "matched", "moments", "passes"],
    )
    for (method, depth), plan in plans.items():
        sizes, covered = plan.parameters, plan.coverage
        trunk = max(sizes["trunk"], 1)
        table.add_row(
            method,
            f"{depth:.2f}" if isinstance(depth, float) else depth,
            f"{sizes['trunk']:,}",
            f"{sizes['branches']:,}",
            f"{sizes['merged']:,}",
            f"{sizes['merged'] / sizes['experts']:.0%}",
            f"{covered['movable'] / trunk:.0%}",
            megabytes(plan.moment_bytes) if plan.passes else "-",
            str(plan.passes),
        )
    return table


def megabytes(size: int) -> str:
    """A size in bytes as megabytes: `12.3 MB`."""
    return f"{size / 1e6:,.1f} MB"
