"""LoRA experts of one base: rules that merge their factors, beside rules that merge the full weights they make.

    python -m benchmarks.lora                      # prints the table; some minutes on one core
    python -m benchmarks.lora --models out/lora    # keeps what is trained there, and reads it from there

The base and the tasks are those of `same_base`. Every task has an adapter on all linear layers of the base, and a
classifier of its own. Options are chosen on validation images, among the same as in `same_base`; the scores are those
of test images. The size of an update is told in adapters: what it holds, over what one expert's adapter holds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTForImageClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import hf_zipit
from benchmarks.measure import machine, sources
from benchmarks.same_base import (
    CALIBRATION,
    IMAGES,
    PARTS,
    SEEDS,
    TASKS,
    Small,
    World,
    called,
    default_and_best,
    merged,
    options_of,
    stored,
    trained_base,
)  # fmt: skip
from benchmarks.zoo.pair import rows
from benchmarks.zoo.pairs.many import TASKS as ALL
from benchmarks.zoo.pairs.many import _data
from benchmarks.zoo.recipe import Schedule
from benchmarks.zoo.training import fit
from hf_zipit.experts.loading import load_experts
from hf_zipit.lora.merged import MergedAdapters
from hf_zipit.registry import LORA_RULES

RANK = 8
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

WEIGHTS = (0.3, 0.4, 0.5, 0.7, 1.0)
"""What `linear` multiplies every update by, beside its default."""

SPACES: dict[str, Sequence[str]] = {"core-space": ("tsv-m", "iso-c", "ties"), "knots": ("ties", "tsv-m")}
"""By rule that merges in a space of its own the combining rules that are tried there, its default first."""

FULL = ("average", "task-arithmetic", "ties", "dare", "tsv-m", "iso-c", "regmean", "wudi")
"""The rules for full weights."""


@dataclass(frozen=True)
class Adapters:
    """The base's folder, the adapters' folders by task, and the experts as full models."""

    base: Path
    folders: Mapping[str, Path]
    world: World

    @property
    def size(self) -> int:
        """How many numbers the factors of one expert are."""
        return size_of(hf_zipit.merge_adapters(self.folders)) // len(self.folders)


def trained_adapter(task: str, base: Path, folder: Path, seed: int) -> None:
    """Train an adapter and a classifier on one task, and save them."""
    names = dict(enumerate(ALL[task][1]))
    torch.manual_seed(seed)
    model = ViTForImageClassification.from_pretrained(
        base, id2label=names, label2id={name: i for i, name in names.items()}, ignore_mismatched_sizes=True
    )
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS), modules_to_save=["classifier"])
    adapted = get_peft_model(model, config)
    recipe = Small(len(TASKS))
    recipe.schedule = Schedule(epochs=2, batch_size=64, learning_rate=2e-3, weight_decay=0.0)
    fit(recipe, adapted, rows(_data(task, "train"), slice(IMAGES)), seed, title=task)
    adapted.save_pretrained(folder)
    model.config.save_pretrained(folder)  # the names of its classes


def experts(root: Path) -> Adapters:
    """The base and the experts, trained where they are not in the folder yet."""
    stored(root, "base", lambda: trained_base(SEEDS[0]))
    folders = {task: root / task for task in TASKS}
    for number, (task, folder) in enumerate(folders.items()):
        if not (folder / "config.json").is_file():
            trained_adapter(task, root / "base", folder, 10 + number)
    full = load_experts({task: str(folder) for task, folder in folders.items()})
    base = ViTForImageClassification.from_pretrained(root / "base").eval()
    return Adapters(root / "base", folders, World(full, dict.fromkeys(TASKS, base)))


def settings_of(rule: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of a rule on factors: their titles, and the options that are tried for each, its defaults first."""
    if rule not in SPACES:
        yield f"`{rule}`", [{}, *({"weights": [w] * len(TASKS)} for w in WEIGHTS if rule == "linear")]
        return
    for combine in SPACES[rule]:
        yield f"`{rule}`, {combine}", [{"combine": combine, "options": options} for options in options_of(combine)]


def size_of(merged: MergedAdapters) -> int:
    """How many numbers the merged factors are."""
    return sum(factor.numel() for update in merged.updates.values() for factor in update)


def by_factors(given: Adapters, rule: str, options: Mapping[str, Any], rank: int | None = None) -> MergedAdapters:
    data = given.world.calibration() if LORA_RULES.get(rule).needs_data else None
    return hf_zipit.merge_adapters(given.folders, data, rule=rule, options=options, rank=rank)


def lora_rows(given: Adapters, rule: str, own: Mapping[str, float]) -> Iterator[tuple[float, str]]:
    """A rule on factors, by its defaults, by its best on validation, and that cut to an expert's rank."""

    def merging(options: Mapping[str, Any], rank: int | None = None) -> tuple[Mapping[str, Any], float]:
        started = time.perf_counter()
        found = by_factors(given, rule, options, rank)
        seconds = time.perf_counter() - started
        return called(found.model(), given.world), seconds

    for title, every in settings_of(rule):
        trials = default_and_best(given.world, every, merging)
        for trial, cut in [*((one, None) for one in trials), (trials[-1], RANK)]:
            scores = trial.scores if cut is None else given.world.scores(merging(trial.options, cut)[0], "test")
            size = size_of(by_factors(given, rule, trial.options, cut)) / given.size
            name = title + words(trial.options) + (f", cut to rank {cut}" if cut else "")
            yield row(name, scores, own, size, trial.seconds)


def full_rows(given: Adapters, own: Mapping[str, float]) -> Iterator[tuple[float, str]]:
    """Rules for full weights, and merges that read unlabelled images."""
    world = given.world
    size = sum(p.numel() for p in trunk(next(iter(world.experts.values())))) / given.size
    for rule in FULL:
        for trial in default_and_best(
            world, options_of(rule), lambda options, rule=rule: merged(world, rule, options)
        ):
            yield row(f"full, `{rule}`{words(trial.options)}", trial.scores, own, size, trial.seconds)
    for name, settings in {"refit, no alignment": {"method": "identity"}, "`hf_zipit.merge`": {}}.items():
        started = time.perf_counter()
        model = hf_zipit.merge(world.experts, world.calibration(), refit=True, **settings)
        seconds = time.perf_counter() - started
        yield row(f"full, {name}", world.scores(called(model, world), "test"), own, size, seconds)


def trunk(model: ViTForImageClassification) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier")]


def words(options: Mapping[str, Any]) -> str:
    """Options for a row's name; the combining rule is there already."""
    inner = {**{name: value for name, value in options.items() if name != "combine"}, **options.get("options", {})}
    inner.pop("options", None)
    told = {name: f"{value[0]} each" if isinstance(value, list) else value for name, value in inner.items()}
    return "".join(f", {name} {value}" for name, value in told.items())


def row(
    name: str, scores: Mapping[str, float], own: Mapping[str, float], size: float | None, seconds: float | None
) -> tuple[float, str]:
    """What a row is sorted by, the mean share of the experts' own scores, and its line of the table."""
    shares = [scores[task] / own[task] for task in own]
    mean = sum(shares) / len(shares)
    cells = [f"{100 * share:.1f} %" for share in (*shares, mean, min(shares))]
    cells += ["" if size is None else f"{size:.1f}", "" if seconds is None else f"{seconds:.2f}"]
    return mean, f"| {name} | {' | '.join(cells)} |"


def main(
    models: Annotated[
        Path | None, typer.Option(help="A folder to keep what is trained in, and to read it from.")
    ] = None,
) -> None:
    """Train the base and the adapters, merge them by every rule, print the table."""
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(1)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as room:
        given = experts(models or Path(room))
        own = given.world.scores(given.world.experts, "test")
        found = [one for rule in LORA_RULES for one in lora_rows(given, rule, own)] + list(full_rows(given, own))
    names = ["", *own, "mean", "worst", "size", "seconds"]
    print(f"| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}")
    print(row("experts, their own adapters", own, own, float(len(own)), None)[1])
    print("\n".join(line for _, line in sorted(found, key=lambda one: -one[0])))
    print(f"\nAccuracy of the experts: {', '.join(f'{task} {score:.3f}' for task, score in own.items())}.")
    print(
        f"Sources {sources()}, {machine()}, {time.process_time() - started:.0f} CPU s; rank {RANK}, seed of the base "
        f"{SEEDS[0]}, {PARTS['validation']} validation and at most {PARTS['test']} test images, {CALIBRATION} "
        "unlabelled images of every task for what reads data."
    )


if __name__ == "__main__":
    typer.run(main)
