"""Experts on disk: find them, train the missing ones, load a pair.

An expert is a folder `ROOT/PAIR/TASK` that `from_pretrained` reads, tokenizer included; `ROOT/PAIR-TASK` is read too.
It is written beside and renamed when it is complete, so that a broken run leaves nothing that looks like an expert.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.zoo.pair import Metric, Pair, Splits
from benchmarks.zoo.recipe import Recipe
from benchmarks.zoo.table import RECIPES
from benchmarks.zoo.training import fit

RECORD = "training.json"  # written into an expert's folder: seed, seconds, scores


def load(name: str, root: str | Path, train: bool = True) -> Pair:
    """A pair of the zoo: experts in evaluation mode, data and score.

    Args:
        name: a key of `RECIPES`.
        root: the folder of the zoo.
        train: train experts that `root` lacks (minutes each) and save them there.

    Raises:
        ValueError: the zoo has no such pair.
        FileNotFoundError: an expert is missing and `train` is off, or a data package is not installed.
    """
    recipe = _recipe(name)
    root = Path(root)
    missing = [task for task in recipe.seeds if _found(root, recipe, task) is None]
    if missing and not train:
        raise FileNotFoundError(
            f"{root} has no expert {missing[0]!r} of {name!r}: "
            f"run `python -m benchmarks.zoo --out {root} --only {name}`."
        )
    build([name], root)
    folders = {task: _found(root, recipe, task) for task in recipe.seeds}
    experts = {task: recipe.model_class.from_pretrained(folder).eval() for task, folder in folders.items()}
    tokenizer = _tokenizer(recipe, root)
    return Pair(name, experts, recipe.splits(tokenizer), recipe.metric(tokenizer), tokenizer)


def splits_of(recipe: Recipe, root: str | Path) -> tuple[Splits, Metric]:
    """A pair's data and how it is scored, without its experts."""
    tokenizer = _tokenizer(recipe, Path(root))
    return recipe.splits(tokenizer), recipe.metric(tokenizer)


def build(
    names: Iterable[str],
    root: str | Path,
    reuse: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    shift: int = 0,
) -> None:
    """Put the named pairs' experts into `root`: what is there stays, what `reuse` has is copied, the rest is trained.

    Args:
        say: is called with one line for every expert that was copied or trained.
        shift: is added to every seed of training; a shift wants a root of its own.
    """
    root = Path(root)
    for name in names:
        recipe = _recipe(name)
        for task in recipe.seeds:
            if _found(root, recipe, task) is not None:
                continue
            source = None if reuse is None else _found(Path(reuse), recipe, task)
            if source is not None:
                _write(root / _folder(recipe) / task, lambda folder, source=source: _copy(source, folder))
                say(f"{name} {task}: copied from {source}")
            else:
                say(f"{name} {task}: {_train(recipe, task, root, shift)}")


def _train(recipe: Recipe, task: str, root: Path, shift: int) -> str:
    """Train and save one expert; returns its record as a line."""
    seed = recipe.seeds[task] + shift
    tokenizer = _tokenizer(recipe, root)
    data = recipe.splits(tokenizer)[task]
    metric = recipe.metric(tokenizer)
    started, worked = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.untrained(task, tokenizer)
        losses = fit(recipe, model, data["train"], seed, tokenizer, f"{recipe.name} {task}")
    record = {
        "pair": recipe.name,
        "task": task,
        "seed": seed,
        "steps": len(losses),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),  # says more than `seconds` on a busy machine
        "threads": torch.get_num_threads(),
        "metric": metric.name,
        **{split: metric.hits(model, data[split], metric.prompts.get(task, {})) for split in ("validation", "test")},
        "chance": metric.chance(data["test"]),
    }
    _write(root / _folder(recipe) / task, lambda folder: _save(folder, model, tokenizer, record))
    return ", ".join(f"{key} {round(record[key], 4)}" for key in ("cpu_seconds", "validation", "test", "chance"))


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, record: dict) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _copy(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)


def _write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside the final one, then rename it."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(folder)


def _tokenizer(recipe: Recipe, root: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the pair's saved experts share, or a new one before the first expert is trained."""
    for task in recipe.seeds:
        folder = _found(root, recipe, task)
        if folder is not None and (folder / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(folder)
    return recipe.train_tokenizer()


def _folder(recipe: Recipe) -> str:
    return recipe.folder or recipe.name


def _found(root: Path, recipe: Recipe, task: str) -> Path | None:
    candidates = (root / _folder(recipe) / task, root / f"{_folder(recipe)}-{task}")
    return next((folder for folder in candidates if (folder / "model.safetensors").exists()), None)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"The zoo has no pair {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
