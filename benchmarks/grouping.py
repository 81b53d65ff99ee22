"""How well what experts lose in merges of two tells what they lose in larger groups.

    python -m benchmarks.grouping --zoo zoo --name many-4

Groups are found as `hf_zipit.group` finds them, on unlabelled calibration data. Then every division into two groups is
really merged, and measured on the test split. Experts that are missing are trained first (minutes each).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer
from scipy.stats import spearmanr

import hf_zipit
from benchmarks.results import SAMPLES
from benchmarks.zoo import load
from hf_zipit.grouping.grouping import Grouping
from hf_zipit.report.grouping import disturbance
from hf_zipit.report.plots import save_picture

SEED = 0
SETTINGS = {"permute": {"method": "permute", "refit": None}, "permute + refit": {"method": "permute", "refit": True}}


def divisions(tasks: list[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All divisions into two groups, the first task in the first."""
    first, *rest = tasks
    for count in range(len(rest)):
        for others in combinations(rest, count):
            yield (first, *others), tuple(task for task in rest if task not in others)


def expected(found: Grouping, groups: tuple[tuple[str, ...], ...]) -> float:
    """What the tasks are expected to lose together, in nats."""
    return sum(found.loses[a][b] for members in groups for a in members for b in members if a != b)


def main(
    zoo: Annotated[Path, typer.Option(help="Where the experts are, or are to be.")] = Path("zoo"),
    name: Annotated[str, typer.Option(help="Which experts of the zoo.")] = "many-4",
    plot: Annotated[Path | None, typer.Option(help="A folder for pictures of who disturbs whom.")] = None,
) -> None:
    """Print, for merges with and without refit, what was expected of every division beside what it keeps."""
    pair = load(name, zoo)
    tasks = list(pair.experts)
    data = {task: pair.calibration(task, SAMPLES, SEED) for task in tasks}
    alone = {task: pair.score(expert, task) for task, expert in pair.experts.items()}
    for how, settings in SETTINGS.items():
        found = hf_zipit.group(pair.experts, data, seed=SEED, **settings)
        if plot is not None:
            save_picture(disturbance(found, title=name), plot / f"{how.replace(' + ', '-')}.png")

        @cache
        def kept(members: tuple[str, ...], settings: dict = settings) -> float:
            """The sum of the shares of its expert's score that each task of a group keeps."""
            if len(members) == 1:
                return 1.0
            experts, own = ({task: each[task] for task in members} for each in (pair.experts, data))
            merged = hf_zipit.merge(experts, own, seed=SEED, **settings)
            return sum(pair.score(partial(merged, task=task), task) / alone[task] for task in members)

        print(f"\n## {how}\n\n| task | {' | '.join(f'with {task}' for task in tasks)} |")
        print("| --- |" + " ---: |" * len(tasks))
        for task in tasks:
            cells = [f"{found.loses[task][other]:+.3f}" if other != task else "" for other in tasks]
            print(f"| {task} | {' | '.join(cells)} |")
        print("\n| groups | expected | kept, mean of the tasks |\n| --- | ---: | ---: |")
        rows = [(expected(found, groups), sum(map(kept, groups)) / len(tasks), groups) for groups in divisions(tasks)]
        for loss, share, groups in sorted(rows):
            mark = (
                " (chosen)" if {frozenset(members) for members in groups} == set(map(frozenset, found.groups)) else ""
            )
            print(f"| {' / '.join(', '.join(members) for members in groups)}{mark} | {loss:+.3f} | {share:.1%} |")
        losses, shares, _ = zip(*rows, strict=True)
        print(f"\nRank correlation of the two: {spearmanr(losses, shares).statistic:+.2f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
