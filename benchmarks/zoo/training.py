"""The training loop of the zoo: AdamW or SGD with a one-cycle schedule, seeded, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.progress import track
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.zoo.pair import Tensors, rows, trim
from benchmarks.zoo.recipe import Recipe, Schedule

_BUCKET = 16  # batches whose texts are sorted by length together: little padding, still a random order


def fit(
    recipe: Recipe,
    model: PreTrainedModel,
    data: Tensors,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    title: str = "training",
) -> list[float]:
    """Train `model` in place on one task's training split.

    Returns:
        the loss of every step.
    """
    schedule = recipe.schedule
    generator = Generator().manual_seed(seed)
    steps = schedule.epochs * (len(data["labels"]) // schedule.batch_size)
    optimizer = _optimizer(model, schedule)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total_steps=steps)
    losses: list[float] = []
    model.train()
    stream = (batch for _ in range(schedule.epochs) for batch in _epoch(data, schedule.batch_size, generator))
    for batch in track(stream, title, total=steps, transient=True):
        loss = recipe.loss(model, recipe.augment(batch, tokenizer, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
    model.eval()
    return losses


def _optimizer(model: PreTrainedModel, schedule: Schedule) -> torch.optim.Optimizer:
    settings = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    return torch.optim.AdamW(model.parameters(), **settings)


def _epoch(data: Tensors, batch_size: int, generator: Generator) -> Iterator[Tensors]:
    """Every sample once, in random order, the last incomplete batch left out."""
    order = torch.randperm(len(data["labels"]), generator=generator)
    batches = [index for index in _bucketed(order, data, batch_size) if len(index) == batch_size]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield trim(rows(data, batches[i]))


def _bucketed(order: Tensor, data: Tensors, batch_size: int) -> Iterator[Tensor]:
    """Batches of like length, so that little time goes into padding."""
    for window in order.split(_BUCKET * batch_size):
        if "attention_mask" in data:
            window = window[data["attention_mask"][window].sum(1).argsort(stable=True)]
        yield from window.split(batch_size)
