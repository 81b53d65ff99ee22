"""Experts trained from one of them before they are combined (`root`), beside what is solved and what is trained after.

    python -m benchmarks.rooting --zoo zoo --pair fashion-vit

All merges get the same unlabelled samples; what is trained is trained for the same number of steps, rooting for one
expert, `polish` for the merged model on all tasks in every step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import SEED, machine, scored, sources
from benchmarks.results import SAMPLES, Split
from benchmarks.zoo import load
from hf_zipit.merging import merge

STEPS = 300
PLAIN: dict[str, Any] = {"method": "permute", "refit": False, "corrections": ()}
POLISH = {"steps": STEPS}
ROWS: dict[str, dict[str, Any]] = {
    "permute": PLAIN,
    "permute, refit": {"method": "permute", "refit": True},
    "permute, polish": {**PLAIN, "polish": POLISH},
    "permute, refit, polish": {"method": "permute", "refit": True, "polish": POLISH},
    "permute, root": {**PLAIN, "root": POLISH},
    "permute, root, task arithmetic of 0.8": {
        **PLAIN, "root": POLISH, "combine": "task-arithmetic", "combine_options": {"scale": 0.8}
    },
    "identity, root": {**PLAIN, "method": "identity", "root": POLISH},
    "permute, root, refit": {"method": "permute", "refit": True, "root": POLISH},
}  # fmt: skip
"""By the name of the row the settings of the merge."""


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    pair: Annotated[str, typer.Option(help="The pair.")],
    split: Annotated[Split, typer.Option(help="Where the scores come from.")] = Split.test,
    samples: Annotated[int, typer.Option(min=2, help="Calibration samples per task.")] = SAMPLES,
) -> None:
    """Merge a pair in every way, and print a table of the scores."""
    disable_progress_bar()
    loaded = load(pair, zoo, train=False)
    calibration = {task: loaded.calibration(task, samples, SEED) for task in loaded.experts}
    experts = {task: loaded.score(expert, task, split.value) for task, expert in loaded.experts.items()}
    typer.echo(f"|  | {' | '.join(experts)} | mean | of experts | CPU s |\n| --- |{' ---: |' * (len(experts) + 3)}")
    typer.echo(line("experts", experts, experts))
    for name, settings in ROWS.items():
        started = time.process_time()
        merged = merge(loaded.experts, calibration, processor=loaded.tokenizer, seed=SEED, **settings)
        seconds = time.process_time() - started
        typer.echo(line(name, scored(loaded, merged, split.value)["scores"], experts, seconds))
        for task, report in merged.config.method.get("rooted", {}).get("experts", {}).items():
            before, after = report["agreement"].get(task, (None, None))
            typer.echo(f"<!-- rooted {task}: agreement with its expert {before} -> {after} -->", err=True)
    typer.echo(f"\nSources {sources()} on {machine()}; {samples} samples a task, {STEPS} steps, {split.value} split.")


def line(name: str, found: dict[str, float], experts: dict[str, float], seconds: float | None = None) -> str:
    """A row of the table."""
    mean = sum(found.values()) / len(found)
    kept = sum(found[task] / experts[task] for task in experts) / len(experts)
    cells = [*(f"{score:.3f}".removeprefix("0") for score in (*found.values(), mean)), f"{100 * kept:.1f} %"]
    return f"| {name} | {' | '.join(cells)} | {'' if seconds is None else round(seconds)} |"


if __name__ == "__main__":
    typer.run(main)
