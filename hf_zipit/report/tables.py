"""Results, plans and specs as tables for the terminal, on `rich`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from hf_zipit.evaluation.intervals import Comparison, Interval
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


def depth_cell(depth: float | str) -> str:
    """A depth with two digits; the path of a block as it is."""
    return f"{depth:.2f}" if isinstance(depth, float) else depth


def accuracies(found: Accuracies) -> list[str]:
    """The accuracies of one model: each task, their mean, joint."""
    return [*(share(value) for value in found.per_task.values()), share(found.mean), share(found.joint)]


def results_table(
    rows: Iterable[Measurement], experts: Accuracies | None, expert_parameters: int, title: str = ""
) -> Table:
    """A line for every merge, below a line for the experts; of several merges the best is marked."""
    rows = list(rows)
    tasks = list(experts.per_task) if experts else []
    measures = [*tasks, "mean", "joint", "of experts"] if experts else []
    best = best_row(rows)
    table = new_table(title, ["", "method"], ["depth", *measures, "parameters", "seconds"])
    if experts:
        beside = [*accuracies(experts), "100.0 %"]
        table.add_row("", EXPERTS, "-", *beside, f"{expert_parameters:,}", "-", style="dim", end_section=True)
    last = None
    for row in rows:
        if last not in (None, row.method):
            table.add_section()
        last = row.method
        measured = [*accuracies(row.accuracy), kept_share(row.accuracy, experts)] if row.accuracy and experts else []
        mark, style = ("best", "bold") if row is best else ("", None)
        numbers = (f"{row.depth:.2f}", *measured, f"{row.parameters:,}", f"{row.seconds:.1f}")
        table.add_row(mark, row.method, *numbers, style=style)
    return table


def best_row(rows: Sequence[Measurement]) -> Measurement | None:
    """The merge with the highest mean accuracy, among equals the smallest; None where there is nothing to compare.

    At depth 0 nothing is merged, so that such a row is none.
    """
    measured = [row for row in rows if row.accuracy is not None and row.depth != 0]
    if len(measured) < 2:
        return None
    return min(measured, key=lambda row: (-row.accuracy.mean, row.parameters))


def kept_share(found: Accuracies, experts: Accuracies) -> str:
    """A model's mean accuracy as a share of its experts': `98.1 %`."""
    return f"{found.mean / experts.mean:.1%}".replace("%", " %") if experts.mean else "-"


def summary(kept: Measurement, experts: Accuracies | None) -> str | None:
    """What a merge kept of its experts, in one sentence; None where nothing was measured."""
    if kept.accuracy is not None and experts is not None:
        told = f"{kept_share(kept.accuracy, experts)} of the experts' mean accuracy ({accuracy_words(kept.accuracy)})"
        if kept.comparison is None:
            return told
        return f"{told}; difference {kept.comparison.mean.value:+.3f}, 95 % {signed_ends(kept.comparison.mean)}"
    if kept.agreement is None:
        return None
    count = sum(kept.agreement.samples.values())
    told = f"answers as its experts do on {100 * kept.agreement.mean:.1f} % of {count:,} samples"
    return f"{told} ({accuracy_words(kept.agreement)}); labels were not read"


def accuracy_words(found: Accuracies) -> str:
    """The accuracy of every task in words: `clothes .957, shoes .931`."""
    return ", ".join(f"{task} {share(value)}" for task, value in found.per_task.items())


def accuracy_table(models: Mapping[str, Accuracies], title: str = "") -> Table:
    """A line for every model; below it the 95 % intervals and the calibration error, where they are known."""
    tasks = list(next(iter(models.values())).per_task)
    table = new_table(title, ["model"], [*tasks, "mean", "joint"])
    for name, found in models.items():
        table.add_row(name, *accuracies(found))
        if found.intervals:
            table.add_row("  95 % interval", *(ends(found.intervals[task]) for task in tasks), "", "", style="dim")
        if found.calibration_error:
            errors = (share(found.calibration_error[task].value) for task in tasks)
            table.add_row("  calibration error", *errors, "", "", style="dim")
    return table


def comparison_table(found: Comparison, names: tuple[str, str], title: str = "") -> Table:
    """How two models differ: a column for every task."""
    tasks = list(found.difference)
    table = new_table(title, ["on the same samples"], [*tasks, "mean"])
    each = [found.difference[task] for task in tasks]
    table.add_row(f"{names[0]} less {names[1]}", *(f"{one.value:+.3f}" for one in each), f"{found.mean.value:+.3f}")
    table.add_row("  95 % interval", *map(signed_ends, each), signed_ends(found.mean), style="dim")
    same = [found.agreement[task] for task in tasks]
    table.add_row("same answer", *(share(one.value) for one in same), "")
    table.add_row("  95 % interval", *map(ends, same), "", style="dim")
    return table


def ends(interval: Interval) -> str:
    """The ends of the interval of a share: `.931-.978`."""
    return f"{share(interval.low)}-{share(interval.high)}"


def signed_ends(interval: Interval) -> str:
    """The ends of the interval of a difference: `-.021 to +.004`."""
    return f"{interval.low:+.3f} to {interval.high:+.3f}"


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
        words = (row["name"], row["symmetry"], row["frozen_by"] or "")
        numbers = ("" if row[name] is None else f"{row[name]:,}" for name in ("heads", "size", "parameters"))
        table.add_row(*words, *numbers, style="dim" if row["symmetry"] == "fixed" else None)
    return table


def plans_table(plans: Mapping[tuple[str, float | str], Plan], title: str = "") -> Table:
    """What every merge of a recipe would do."""
    numbers = ["trunk", "branches", "merged", "of experts", "matched", "moments", "passes"]
    table = new_table(title, ["method", "cut"], numbers)
    for (method, depth), plan in plans.items():
        sizes = plan.parameters
        cells = [f"{sizes[part]:,}" for part in ("trunk", "branches", "merged")]
        cells.append(f"{sizes['merged'] / sizes['experts']:.0%}")
        cells.append(f"{plan.coverage['movable'] / max(sizes['trunk'], 1):.0%}")
        cells.append(megabytes(plan.moment_bytes) if plan.passes else "-")
        table.add_row(method, depth_cell(depth), *cells, str(plan.passes))
    return table


def held_out_samples(samples: Mapping[str, int]) -> str:
    """How many samples of each task were held out, in words."""
    counts = set(samples.values())
    if len(counts) == 1:
        return f"{counts.pop()} held-out samples a task"
    return f"{', '.join(f'{count} {task}' for task, count in samples.items())} held-out samples"


def measured_on(samples: Mapping[str, int], answers: str) -> str:
    """Which held-out samples were measured on, and who said what is right there, in words."""
    right = {"labels": "labelled", "experts": "labelled by the experts"}[answers]
    return f"{held_out_samples(samples)}, {right}"


def megabytes(size: int) -> str:
    """A size in bytes as megabytes: `12.3 MB`."""
    return f"{size / 1e6:,.1f} MB"
