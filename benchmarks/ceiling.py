"""The ceiling: how good a model of one expert's size can be that learns from the same unlabelled samples by gradients.

    python -m benchmarks.ceiling --zoo zoo --pair chars-roberta --split validation

The model is the merged one: one trunk, and the tasks' own heads and readout maps. It starts from `START` and is
distilled from its experts (arXiv 1503.02531) on exactly the calibration samples that the closed form gets: Adam with a
one-cycle rate on the logits (Kullback-Leibler divergence) and on the features, which are what enters the modules that
stay a task's own, as far as that differs from the expert's, relative to their variance. No label is read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Generator, Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import METHODS, SEED, Row, machine, scored, sources
from benchmarks.zoo import Pair, Tensors, load
from benchmarks.zoo.pair import rows, trim
from hf_zipit.merging import merge

CEILING = "ceiling"
START = "permute + refit"
STEPS = 600
BATCH = 16  # samples of every task in a step
RATE = 1e-3


def distilled(
    pair: Pair, calibration: Mapping[str, Tensors], start: str = START, steps: int = STEPS, rate: float = RATE
) -> PreTrainedModel:
    """The merged model after distillation, in evaluation mode.

    Args:
        calibration: unlabelled samples by task.
        start: the row of the results whose merged model it starts from.
        rate: the peak of Adam's rate.
    """
    method = METHODS[start]
    settings = method.settings_for(pair.name)
    data = calibration if method.data else None
    merged = merge(pair.experts, data, processor=pair.tokenizer, seed=SEED, **settings)
    generator = Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(merged.parameters(), rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for task, samples in calibration.items():
            count = len(next(iter(samples.values())))
            batch = trim(rows(samples, torch.randint(count, (BATCH,), generator=generator)))
            distance(pair, merged, task, batch).backward()
        torch.nn.utils.clip_grad_norm_(merged.parameters(), 1.0)
        optimizer.step()
        cycle.step()
    return merged.eval()


def distance(pair: Pair, merged: PreTrainedModel, task: str, batch: Tensors) -> Tensor:
    """How far the merged model's answers and features for one task are from the expert's, a scalar."""
    inputs = batch | pair.metric.prompts.get(task, {})
    paths = [entry["module"] for entry in merged.config.entries]
    with torch.no_grad():
        wanted, targets = with_inputs(pair.experts[task], pair.experts[task], paths, inputs)
    found, features = with_inputs(merged, merged.branch(task), paths, inputs | {"task": task})
    apart = [(features[path] - targets[path]).square().mean() / targets[path].var() for path in paths]
    logits, soft = (pair.metric.logits(output).log_softmax(-1).flatten(0, -2) for output in (found, wanted))
    return kl_div(logits, soft, reduction="batchmean", log_target=True) + sum(apart)


def with_inputs(
    model: nn.Module, owner: nn.Module, paths: list[str], inputs: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The model's output, and what entered the named modules of `owner` on the way, by path."""
    seen: dict[str, Tensor] = {}

    def see(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[path] = args[0] if args else next(iter(kwargs.values()))

    with ExitStack() as hooks:
        for path in paths:
            hook = owner.get_submodule(path).register_forward_pre_hook(partial(see, path), with_kwargs=True)
            hooks.callback(hook.remove)
        return model(**inputs), seen


def measure_ceiling(zoo: str, pair: str, split: str, samples: int, **settings: Any) -> Row:
    """The ceiling as a row of the results.

    Args:
        zoo: the folder of the trained experts.
        samples: calibration samples per task, of the train split.
        settings: of `distilled`.
    """
    disable_progress_bar()
    loaded = load(pair, zoo, train=False)
    calibration = {task: loaded.calibration(task, samples, SEED) for task in loaded.experts}
    started, worked = time.perf_counter(), time.process_time()
    merged = distilled(loaded, calibration, **settings)
    cost = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    about = {"sources": sources(), "machine": machine()}
    return Row(pair, CEILING, 1.0, split, samples, **scored(loaded, merged, split), **cost, **about)


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    pair: Annotated[str, typer.Option(help="The pair.")],
    split: Annotated[str, typer.Option(help="Where the scores come from.")] = "test",
    samples: Annotated[int, typer.Option(min=BATCH, help="Calibration samples per task.")] = 512,
    start: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = START,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    rate: Annotated[float, typer.Option(help="The peak of Adam's rate.")] = RATE,
) -> None:
    """Distil one pair's merged model and print its scores."""
    row = measure_ceiling(str(zoo), pair, split, samples, start=start, steps=steps, rate=rate)
    scores = ", ".join(f"{task} {score:.4f}" for task, score in row.scores.items())
    typer.echo(f"{pair}: {scores}, on average {row.mean:.4f}, {row.cpu_seconds:.0f} CPU s")


if __name__ == "__main__":
    typer.run(main)
