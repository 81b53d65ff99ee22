"""What training adds to the closed form: one pair of the zoo, merged without and with `polish`.

    python -m benchmarks.polish --zoo zoo --pair chars-roberta

Both merges get the same unlabelled samples. The last row of `docs/frontier.md`, the ceiling, is the same training by
another loop, in which nothing is held out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils.logging import disable_progress_bar

from benchmarks.ceiling import START
from benchmarks.measure import METHODS, SEED, scored
from benchmarks.results import SAMPLES, Split
from benchmarks.zoo import load
from hf_zipit.merging import merge


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    pair: Annotated[str, typer.Option(help="The pair.")],
    split: Annotated[Split, typer.Option(help="Where the scores come from.")] = Split.test,
    samples: Annotated[int, typer.Option(min=2, help="Calibration samples per task.")] = SAMPLES,
    settings: Annotated[str, typer.Option(help="Of PolishConfig, as JSON.")] = "{}",
) -> None:
    """Merge a pair without and with polish, and print the experts' scores beside those of both."""
    disable_progress_bar()
    loaded = load(pair, zoo, train=False)
    calibration = {task: loaded.calibration(task, samples, SEED) for task in loaded.experts}
    experts = {task: loaded.score(expert, task, split.value) for task, expert in loaded.experts.items()}
    show("experts", experts)
    chosen = METHODS[START].settings_for(pair)
    for name, polish in (("closed form", None), ("polish", json.loads(settings) or True)):
        started = time.process_time()
        merged = merge(loaded.experts, calibration, processor=loaded.tokenizer, seed=SEED, polish=polish, **chosen)
        seconds = time.process_time() - started
        found = scored(loaded, merged, split.value)["scores"]
        show(name, found, of_experts=sum(found.values()) / sum(experts.values()), cpu_seconds=round(seconds))
        if polish:
            typer.echo(json.dumps(merged.config.method["polished"]))


def show(name: str, scores: dict[str, float], **more: Any) -> None:
    mean = sum(scores.values()) / len(scores)
    typer.echo(f"{name}: {', '.join(f'{task} {score:.4f}' for task, score in scores.items())}, mean {mean:.4f} {more}")


if __name__ == "__main__":
    typer.run(main)
