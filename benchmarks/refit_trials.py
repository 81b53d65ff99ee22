"""What a setting of the refit is worth: the share of the experts' accuracy that is kept, and how far answers moved.

    python -m benchmarks.refit_trials --zoo zoo --pair chars-mixed --try "" --try stream_bases=false --try ridge=1e-3

On validation samples, at depth 1. The distance is the Kullback-Leibler divergence of the merged answers from the
expert's, in nats an answer, on average; it tells small differences apart that a share of hits does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import kl_div
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import SEED
from benchmarks.zoo import RECIPES, Pair, load
from benchmarks.zoo.pair import Forward
from hf_zipit.config import RefitConfig
from hf_zipit.data.written import write_samples
from hf_zipit.merging import merge


@torch.inference_mode()
def distance(pair: Pair, forward: Forward, task: str, split: str) -> float:
    """Of a model's answers from the expert's, where something is asked."""
    total = count = 0.0
    given = (pair.splits[task][split], pair.metric.prompts.get(task, {}), 256)
    answers = (pair.metric.answers(model, *given) for model in (forward, pair.experts[task]))
    for (found, _), (wanted, _) in zip(*answers, strict=True):
        total += float(kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True))
        count += len(found)
    return total / count


def settings_of(text: str) -> dict[str, Any]:
    """`a=1,b=false` as a refit's settings, completed by the defaults."""
    pairs = (part.split("=", 1) for part in text.split(",") if part)
    return {**asdict(RefitConfig()), **{name.strip(): json.loads(value) for name, value in pairs}}


def trial(
    pair: Pair,
    settings: Mapping[str, Any],
    method: str,
    samples: int,
    tokenizer: bool,
    written: bool = False,
) -> str:
    """One merge with a refit and how good it is, as a line."""
    data = {task: pair.calibration(task, samples, SEED) for task in pair.experts}
    if written:
        length = next(iter(data.values()))["input_ids"].shape[1]
        data = write_samples(pair.experts, samples, length, SEED)
    started = time.process_time()
    merged = merge(
        pair.experts,
        data,
        method=method,
        refit=dict(settings),
        processor=pair.tokenizer if tokenizer else None,
        seed=SEED,
    )
    seconds = time.process_time() - started
    scores, whole, moved = [], [], []
    for task, expert in pair.experts.items():
        forward = partial(merged, task=task)
        scores.append(pair.score(forward, task, "validation"))
        whole.append(pair.score(expert, task, "validation"))
        moved.append(distance(pair, forward, task, "validation"))
    kept = 100 * sum(scores) / sum(whole)
    each = ", ".join(f"{score:.4f} of {best:.4f}" for score, best in zip(scores, whole, strict=True))
    return f"kept {kept:.2f} % ({each}), distance {sum(moved) / len(moved):.4f}, {seconds:.1f} CPU s"


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    pair: Annotated[list[str], typer.Option(help=f"One of {', '.join(RECIPES)}; may be repeated.")],
    tries: Annotated[list[str], typer.Option("--try", help="Settings of the refit, name=value,...; repeat.")],
    method: Annotated[str, typer.Option(help="The alignment.")] = "permute",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples per task.")] = 512,
    tokenizer: Annotated[bool, typer.Option(help="Give the tokenizer, which names the mask.")] = True,
    written: Annotated[bool, typer.Option(help="No data: the experts write samples of the same length.")] = False,
) -> None:
    """Merge pairs with every one of some settings of the refit."""
    disable_progress_bar()
    for name in pair:
        loaded = load(name, zoo, train=False)
        for text in tries:
            typer.echo(f"{name} [{text}]: {trial(loaded, settings_of(text), method, samples, tokenizer, written)}")


if __name__ == "__main__":
    typer.run(main)
