"""How high the barrier is between two experts of the zoo, aligned without data, with data, and not at all.

    python -m benchmarks.barrier --zoo zoo --samples 512

The zoo has to be trained before (`python -m benchmarks.zoo --out zoo`). On the straight line between the aligned
trunks every task's loss is measured through its own head: the *barrier* is the largest excess over the line between
the losses at the ends, the *middle* is the merge by plain averaging after the alignment, and its accuracy what that
merge keeps. Methods that look at moments are given unlabelled training samples; what is measured on is the validation
split. See `hf_zipit.landscapes` for the definitions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.results import checked
from benchmarks.zoo import RECIPES, Pair, load
from hf_zipit.config import MergeConfig
from hf_zipit.errors import ZipItError
from hf_zipit.files import check_writable, write_json
from hf_zipit.landscapes.survey import Survey
from hf_zipit.registry import METHODS
from hf_zipit.report.tables import share

WITH_DATA = ("permute", "zip", "dual")
SEED = 0


def data_free() -> list[str]:
    """The registered methods that look at no data, plain averaging first."""
    names = [name for name in METHODS.names() if "moments" not in METHODS.get(name).needs]
    return sorted(names, key=lambda name: (name != "identity", name))


def survey_of(pair: Pair, samples: int, calibration: int) -> Survey:
    """The pair's experts, unlabelled training samples, and labelled validation samples to measure on."""
    return Survey.of(
        pair.experts,
        {task: pair.calibration(task, calibration, SEED) for task in pair.experts},
        {task: dict(pair.splits[task]["validation"]) for task in pair.experts},
        samples=samples,
        seed=SEED,
    )


def rows(survey: Survey, methods: list[str], steps: int, depth: float) -> Iterator[dict[str, Any]]:
    """One row for every method, with the seconds of aligning and merging; the first with data also observes."""
    for method in methods:
        started = time.perf_counter()
        row: dict[str, Any] = {"data": "moments" in METHODS.get(method).needs}
        try:
            surface = survey.surface(survey.pair(None), MergeConfig(method=method, depth=depth, seed=SEED))
            row["seconds"] = time.perf_counter() - started
            row |= survey.curve(surface, steps).to_dict()
        except ZipItError as error:
            row |= {"method": method, "error_message": " ".join(str(error).split())}
        yield row


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    if "error_message" in row:
        return f"| {row['method']} | {row['error_message']} |"
    middle = [share(1 - errors[len(row["at"]) // 2]) for errors in row["error"].values()]
    barriers = [f"{value:.3f}" for value in (*row["barrier"].values(), row["mean_barrier"])]
    exact, data = ("yes" if row[name] else "no" for name in ("exact", "data"))
    return f"| {' | '.join([row['method'], data, exact, *barriers, *middle, format(row['seconds'], '.1f')])} |"


def head(tasks: list[str]) -> str:
    """The head of the Markdown table."""
    names = [f"barrier {task}" for task in tasks] + ["barrier of the mean"] + [f"middle {task}" for task in tasks]
    cells = ["method", "data", "ends exact", *names, "seconds"]
    return f"| {' | '.join(cells)} |\n| --- | --- | --- | {' | '.join('---:' for _ in cells[3:])} |"


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "fashion-vit",
    methods: Annotated[
        list[str] | None, typer.Option(help="All without data, and permute, zip and dual, if not given.")
    ] = None,
    depth: Annotated[float, typer.Option(help="The share of blocks that is moved.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Validation samples per task.")] = 512,
    calibration: Annotated[int, typer.Option(min=1, help="Calibration samples per task.")] = 512,
    steps: Annotated[int, typer.Option(min=3, help="Points on the line; an odd number has a middle.")] = 11,
    numbers: Annotated[Path | None, typer.Option("--json", help="Where to keep the exact numbers.")] = None,
) -> None:
    """Print the barriers between the experts of one pair."""
    torch.set_num_threads(1)
    checked("pair", [pair], RECIPES)
    chosen = checked("method", methods, METHODS.names()) if methods else [*data_free(), *WITH_DATA]
    if numbers is not None:
        check_writable(numbers.parent)
    survey = survey_of(load(pair, zoo, train=False), samples, calibration)
    tasks = list(survey.experts)
    typer.echo(
        f"{pair}, depth {depth:g}; {samples} validation samples per task, {calibration} for methods with data\n"
    )
    typer.echo(head(tasks))
    found = []
    for row in rows(survey, chosen, steps, depth):
        found.append(row)
        typer.echo(line(row))
        if numbers is not None:
            write_json(numbers, {"pair": pair, "depth": depth, "samples": survey.held.counts, "rows": found})


if __name__ == "__main__":
    typer.run(main)
