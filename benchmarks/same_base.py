"""Experts of one base, and of two: every combining rule by its defaults and by its best on validation, and the refit.

    python -m benchmarks.same_base docs/same_base.md

A small ViT is trained on four tasks of small grey images together (`BASE_TASKS`), then fine-tuned on each of `TASKS`
alone, for eight tasks also on each of those that the base knows; some experts once more under the stresses of DisTaC,
so that they are far from their base, or sure of nothing. Where the task of a sample is known, every kind of residue is
measured with its size.
What is tuned is tuned on validation images only; the scores are those of test images. With a file the tables go into
it, under the lines that it has above `MARK`; with `--section` only those are made again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import hf_zipit
from benchmarks.measure import machine, sources
from benchmarks.zoo.pair import Metric, Tensors, concatenate, rows
from benchmarks.zoo.pairs.many import TASKS as ALL
from benchmarks.zoo.pairs.many import Many, _data
from benchmarks.zoo.recipe import Schedule
from benchmarks.zoo.training import fit
from hf_zipit.files import write_text
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.registry import RESIDUES, RULES

TASKS = ("tops", "letters", "digits", "turns")
BASE_TASKS = ("others", "shapes", "dots", "stripes")
BASE_IMAGES, IMAGES = 2500, 3000  # of every task, to train on
PARTS = {"validation": 250, "test": 1000}
CALIBRATION = 256  # unlabelled training images of every task
SEEDS = (1, 2)  # of the bases
MARK = "<!-- tables -->"

SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "task-arithmetic": {"scale": SCALES},
    "ties": {"share": (0.2, 0.5), "scale": (0.5, 1.0, 1.5)},
    "dare": {"drop": (0.5, 0.9), "scale": (0.2, 0.3, 0.5)},
    "dare-ties": {"drop": (0.3, 0.5, 0.9), "scale": (0.5, 1.0)},
    "della": {"drop": (0.3, 0.5, 0.7), "scale": (0.5, 1.0)},
    "breadcrumbs": {"smallest": (0.5, 0.85), "scale": (0.3, 0.5, 1.0)},
    "consensus": {"threshold": (0.2, 0.4, 0.6), "scale": (0.3, 0.5)},
    "pcb": {"share": (0.1, 0.3), "scale": (0.7, 1.0, 1.5)},
    "tsv-m": {"scale": (0.5, 0.7, 1.0, 1.3)},
    "iso-c": {"scale": (0.5, 0.7, 1.0, 1.3)},
    "iso-cts": {"scale": (0.5, 0.7, 1.0, 1.3)},
    "cart": {"share": (0.1, 0.5), "scale": (0.3, 0.5, 1.0)},
    "ace": {"ridge": (1e-6, 1e-5, 2e-4)},
    "wudi": {"ridge": (1e-8, 1e-4)},
    "regmean": {"share": (0.5, 0.9, 0.95, 1.0)},
    "regmean++": {"share": (0.5, 0.9, 0.95, 1.0)},
    "mats": {"steps": (3, 10, 100)},
    "featcal": {"after": ("average", "task-arithmetic", "tsv-m"), "reach": (1.0, 2.0), "ridge": (0.005, 0.05)},
    "svc": {"after": ("task-arithmetic", "tsv-m", "iso-c"), "floor": (0.25, 0.5)},
}
"""By rule the options that are tried on validation; those of other rules are left as they are."""


@dataclass(frozen=True)
class Stress:
    """How some experts are trained otherwise: with a multiple of the learning rate, or towards smoothed labels."""

    about: str = "as they are"
    rate: float = 1.0
    smoothing: float = 0.0


PLAIN = Stress()
STRESSES = (Stress("far from their base", rate=4.0), Stress("sure of nothing", smoothing=0.5))
STRESSED = ("letters", "turns")
"""The experts that are trained otherwise, the other two stay as they are."""

UNDER_STRESS = ("average", "task-arithmetic", "ties", "tsv-m", "wudi", "regmean", "regmean++", "featcal", "svc")
"""The rules that are tried under stress, by their defaults."""

OF_EIGHT = ("average", "task-arithmetic", "ties", "tsv-m", "iso-c", "svc", "regmean", "featcal")
"""The rules that are tried on eight tasks."""

KINDS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("none", None),
    *((f"`tall`, threshold {value}", {"kind": "tall", "options": {"threshold": value}}) for value in (0.4, 0.6, 1.0)),
    ("`emr`", {"kind": "emr"}),
    *((f"`t-switch`, share {value}", {"kind": "t-switch", "options": {"share": value}}) for value in (0.25, 0.5)),
    *((f"`{kind}`", {"kind": kind, "size": size}) for kind in ("signs", "low-rank") for size in (1.1, 1.25, 1.4)),
)
"""Kinds of residues on top of the average, the first the average alone."""


class Small(Many):
    """The zoo's tasks by a ViT with larger patches, fewer images and shorter training."""

    smoothing = 0.0

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return cross_entropy(model(**inputs).logits, batch["labels"], label_smoothing=self.smoothing)

    def untrained_of(self, names: Sequence[str]) -> ViTForImageClassification:
        """A model with a fresh head; the caller seeds torch."""
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, image_size=28,
                patch_size=7, num_channels=1, id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
            )
        )  # fmt: skip


@dataclass(frozen=True)
class World:
    """Experts with their data, and the base of each."""

    experts: Mapping[str, PreTrainedModel]
    bases: Mapping[str, PreTrainedModel]

    def scores(self, models: Mapping[str, Any], part: str) -> dict[str, float]:
        """By task the accuracy of a model on it."""
        metric = Metric("accuracy")
        data = {task: rows(_data(task, part), slice(PARTS[part])) for task in self.experts}
        return {task: metric.hits(models[task], data[task], {}) for task in self.experts}

    def calibration(self) -> dict[str, Tensors]:
        """Unlabelled images: the first of every task's training split, which is in random order."""
        return {task: {"pixel_values": _data(task, "train")["pixel_values"][:CALIBRATION]} for task in self.experts}

    def take(self, tasks: Sequence[str]) -> World:
        return World({t: self.experts[t] for t in tasks}, {t: self.bases[t] for t in tasks})


def stored(folder: Path | None, name: str, train: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model of that name in a folder, trained and stored where it is not there yet; without a folder, trained."""
    if folder is None:
        return train()
    if not (folder / name / "config.json").is_file():
        train().save_pretrained(folder / name)
    return ViTForImageClassification.from_pretrained(folder / name).eval()


def trained_base(seed: int) -> PreTrainedModel:
    """The model that experts start from: all classes of `BASE_TASKS` at once."""
    recipe, names, parts = Small(len(TASKS)), [], []
    for task in BASE_TASKS:
        data = rows(_data(task, "train"), slice(BASE_IMAGES))
        parts.append({**data, "labels": data["labels"] + len(names)})
        names += [f"{task}: {name}" for name in ALL[task][1]]
    torch.manual_seed(seed)
    base = recipe.untrained_of(names)
    recipe.schedule = Schedule(epochs=3, batch_size=64, learning_rate=1e-3, weight_decay=0.05)
    fit(recipe, base, concatenate(parts), seed, title=f"base {seed}")
    return base


def trained_expert(task: str, base: PreTrainedModel, seed: int, stress: Stress = Stress()) -> PreTrainedModel:  # noqa: B008
    """The base with a fresh head, fine-tuned on one task."""
    recipe = Small(len(TASKS))
    recipe.smoothing = stress.smoothing
    torch.manual_seed(seed)
    expert = recipe.untrained_of(ALL[task][1])
    expert.vit.load_state_dict(copy.deepcopy(base.vit.state_dict()))
    recipe.schedule = Schedule(epochs=2, batch_size=64, learning_rate=5e-4 * stress.rate, weight_decay=0.05)
    fit(recipe, expert, rows(_data(task, "train"), slice(IMAGES)), seed, title=task)
    return expert


ROUTED = ({"kind": "t-switch", "router": True}, {"kind": "low-rank", "size": 1.4, "router": True})
"""Kinds of residues with a router, which reads calibration images."""

SMILE = tuple(
    {"kind": kind, **size, "router": "smile", "router_options": {"top": top}}
    for kind, size in (("low-rank", {"size": 1.4}), ("t-switch", {}))
    for top in (1, 2)
)
"""Kinds of residues that every token gets by the gates of SMILE, which read the base and no data."""

WEMOE = ("wemoe", "wemoe-distilled")
"""Trainings of routers that weigh the task vectors of MLPs for every sample, on calibration images."""

FEW = {"steps": 200, "evaluate_every": 25}
"""Of these trainings."""


def options_of(rule: str) -> Iterator[dict[str, Any]]:
    """The settings of a rule that are tried, its defaults first."""
    grid = GRIDS.get(rule, {})
    yield {}
    for values in product(*grid.values()) if grid else ():
        yield dict(zip(grid, values, strict=True))


def merged(world: World, rule: str, options: Mapping[str, Any], **settings: Any) -> tuple[Mapping[str, Any], float]:
    """By task a model to call, and the seconds that the merge took."""
    base = world.bases if RULES.get(rule).needs_base else None
    data = world.calibration() if RULES.get(rule).needs_data else None
    started = time.perf_counter()
    settings = {"method": "identity", "corrections": (), **settings}
    model = hf_zipit.merge(world.experts, data, base=base, combine=rule, combine_options=options, **settings)
    return called(model, world), time.perf_counter() - started


def called(model: PreTrainedModel, world: World) -> dict[str, Any]:
    """A merged model by task."""
    return {task: lambda task=task, **inputs: model(**inputs, task=task) for task in world.experts}


def kept(found: Mapping[str, float], own: Mapping[str, float]) -> float:
    """The mean share of the experts' own scores."""
    return sum(found[task] / own[task] for task in own) / len(own)


def line(name: str, found: Mapping[str, float], own: Mapping[str, float], seconds: float | None) -> str:
    """A row of a table: the tasks, their mean, the least, and the mean share of the experts' own scores."""
    cells = [*found.values(), sum(found.values()) / len(found), min(found.values())]
    shown = [f"{cell:.3f}".removeprefix("0") for cell in cells]
    shown += [f"{100 * kept(found, own):.1f} %", "" if seconds is None else f"{seconds:.1f}"]
    return f"| {name} | {' | '.join(shown)} |"


def header(world: World) -> list[str]:
    names = ["", *world.experts, "mean", "worst", "of experts", "seconds"]
    return [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]


@dataclass(frozen=True)
class Trial:
    """A setting of a rule: its options, by task the accuracy on test images, and what the merge gave and took."""

    options: Mapping[str, Any]
    scores: Mapping[str, float]
    models: Mapping[str, Any]
    seconds: float


def default_and_best(
    world: World, every: Iterable[Mapping[str, Any]], merging: Callable[[Mapping[str, Any]], Any]
) -> list[Trial]:
    """The first of some settings and, where that is another one, the best on validation.

    `merging` gives for a setting by task a model to call, and the seconds that the merge took.
    """
    tried = []
    for number, options in enumerate(every):
        models, seconds = merging(options)
        score = sum(world.scores(models, "validation").values())
        tried.append((score, -number, options, models, seconds))
    best = max(tried, key=lambda trial: trial[:2])
    return [
        Trial(options, world.scores(models, "test"), models, seconds)
        for _, _, options, models, seconds in {id(trial): trial for trial in (tried[0], best)}.values()
    ]


def rule_rows(world: World, rule: str, own: Mapping[str, float], **settings: Any) -> Iterator[tuple[float, str]]:
    """The rule by its defaults and, where that is another one, by its best setting on validation."""
    for trial in default_and_best(world, options_of(rule), lambda options: merged(world, rule, options, **settings)):
        words = "".join(f", {name} {value}" for name, value in trial.options.items())
        yield sum(trial.scores.values()), line(f"`{rule}`{words}", trial.scores, own, trial.seconds)


def refit_rows(world: World, own: Mapping[str, float], settings: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Merges that read unlabelled images, by the name of the row."""
    for name, setting in settings.items():
        found, seconds = scored(world, setting)
        yield sum(found.values()), line(name, found, own, seconds)


def scored(world: World, setting: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """By task the accuracy of a merge on test images, and the seconds that it took."""
    base = world.bases if RULES.get(setting.get("combine", "average")).needs_base else None
    started = time.perf_counter()
    model = hf_zipit.merge(world.experts, world.calibration(), base=base, **setting)
    seconds = time.perf_counter() - started
    return world.scores(called(model, world), "test"), seconds


def table(world: World, made: Iterator[tuple[float, str]]) -> str:
    """The experts, then the merges, the best first."""
    own = world.scores(world.experts, "test")
    lines = [text for _, text in sorted(made, key=lambda row: -row[0])]
    return "\n".join([*header(world), line("experts", own, own, None), *lines])


def same_base(world: World, rules: Sequence[str] = ()) -> str:
    own = world.scores(world.experts, "test")
    refits = {
        "refit, no alignment": {"method": "identity", "refit": True},
        "`hf_zipit.merge(experts, calibration)`": {},
    }

    def made() -> Iterator[tuple[float, str]]:
        for rule in rules or RULES:
            if rule != "slerp" or len(world.experts) == 2:
                yield from rule_rows(world, rule, own)
        yield from refit_rows(world, own, refits)

    return table(world, made())


def two_bases(world: World) -> str:
    own = world.scores(world.experts, "test")
    arithmetic = {"combine": "task-arithmetic", "refit": False}
    ties = {"combine": "ties", "refit": False}
    settings = {
        "task arithmetic, bases as they are": {"method": "identity", **arithmetic},
        "bases aligned by weights, task arithmetic": {"method": "weights", **arithmetic},
        "... then rescale-shift": {"method": "weights", **arithmetic, "corrections": "rescale-shift"},
        "bases aligned by activations, task arithmetic": {"method": "permute", **arithmetic},
        "... then rescale-shift ": {"method": "permute", **arithmetic, "corrections": "rescale-shift"},
        "bases aligned by weights, TIES": {"method": "weights", **ties},
        "... then rescale-shift  ": {"method": "weights", **ties, "corrections": "rescale-shift"},
        "`hf_zipit.merge(experts, calibration)`": {},
    }
    lines = [text for _, text in refit_rows(world, own, settings)]
    return "\n".join([*header(world), line("experts", own, own, None), *lines])


def by_task(world: World, method: str = "identity") -> str:
    """What every kind of residue gives where the task is known, and what it takes."""
    plain: dict[str, Any] = {"method": method, "corrections": (), "refit": False}
    own = world.scores(world.experts, "test")
    lines = [
        "| | size | mean | worst | of experts | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        sized("experts side by side", float(len(own)), own, own, None),
    ]
    for name, residues in KINDS:
        kind = RESIDUES.get(residues["kind"]) if residues else None
        base = world.bases if kind and kind.needs_origin else None
        data = world.calibration() if kind and kind.stepwise else None
        started = time.perf_counter()
        model = hf_zipit.merge(world.experts, data, base=base, residues=residues, **plain)
        seconds = time.perf_counter() - started
        bare, kept_bytes = residue_bytes(model)
        found = world.scores(called(model, world), "test")
        lines.append(sized(name, 1 + kept_bytes / bare, found, own, seconds))
    for residues in ROUTED:
        started = time.perf_counter()
        model = hf_zipit.merge(world.experts, world.calibration(), residues=residues, **plain)
        seconds = time.perf_counter() - started
        bare, kept_bytes = residue_bytes(model)
        name = f"`{residues['kind']}`, the task found by the router"
        lines.append(sized(name, 1 + kept_bytes / bare, routed_scores(model, world), own, seconds))
    for residues in SMILE:
        started = time.perf_counter()
        model = hf_zipit.merge(world.experts, base=world.bases, residues=residues, **plain)
        seconds = time.perf_counter() - started
        bare, kept_bytes = residue_bytes(model)
        name = f"`{residues['kind']}`, `smile`, top {residues['router_options']['top']}"
        for about, within in ((", the task's head known", True), ("", False)):
            found = routed_scores(model, world, within)
            lines.append(sized(name + about, 1 + kept_bytes / bare, found, own, seconds))
    return "\n".join(lines)


def unknown_tasks(world: World) -> str:
    """What finds out by itself what a sample needs: routers on top of residues, and those that are trained in MLPs."""
    plain: dict[str, Any] = {"method": "identity", "corrections": (), "refit": False}
    average = {"combine": "task-arithmetic", "combine_options": {"scale": 1 / len(world.experts)}}
    settings: dict[str, dict[str, Any]] = {"average": {}}
    settings |= {f"`{own['kind']}`, `discriminant`": {"residues": own} for own in ROUTED}
    settings |= {
        f"`{own['kind']}`, `smile`, top {own['router_options']['top']}": {"residues": own, "base": world.bases}
        for own in SMILE
    }
    settings |= {
        f"`{kind}`, trained": {"polish": {"kind": kind, **FEW}, "base": world.bases, **average} for kind in WEMOE
    }
    own = world.scores(world.experts, "test")
    lines = [
        "| | size | task and class found | worst | of experts | the task's head known | of experts | seconds |",
        f"| --- |{' ---: |' * 7}",
    ]
    for name, setting in settings.items():
        started = time.perf_counter()
        model = hf_zipit.merge(world.experts, world.calibration(), **plain, **setting)
        seconds = time.perf_counter() - started
        bare, kept_bytes = residue_bytes(model)
        alone, within = (routed_scores(model, world, known) for known in (False, True))
        shown = [
            f"{1 + kept_bytes / bare:.3f}",
            *(f"{x:.3f}".removeprefix("0") for x in (mean(alone), min(alone.values()))),
        ]
        shown += [f"{100 * kept(alone, own):.1f} %", f"{mean(within):.3f}".removeprefix("0")]
        lines.append(f"| {name} | {' | '.join([*shown, f'{100 * kept(within, own):.1f} %', f'{seconds:.1f}'])} |")
    return "\n".join(lines)


def mean(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)


@torch.no_grad()
def routed_scores(model: PreTrainedModel, world: World, within: bool = False) -> dict[str, float]:
    """By task the share of test images of which a routed model finds the task and the class; `within` a task's own
    classes, the class alone."""
    found, offsets = {}, model.config.offsets()
    for task in world.experts:
        data = rows(_data(task, "test"), slice(PARTS["test"]))
        logits = model(pixel_values=data["pixel_values"], task="auto" if model.config.router else None).logits
        start = offsets[task] if within else 0
        own = logits[:, start : start + len(model.config.labels_of(task))] if within else logits
        found[task] = float((own.argmax(-1) + start == data["labels"] + offsets[task]).double().mean())
    return found


def sized(name: str, size: float, found: Mapping[str, float], own: Mapping[str, float], seconds: float | None) -> str:
    """A row: the size as a multiple of the merged model's, the tasks' mean, the least, the share of the experts'."""
    scores = [sum(found.values()) / len(found), min(found.values())]
    shown = [f"{size:.3f}", *(f"{score:.3f}".removeprefix("0") for score in scores)]
    shown += [f"{100 * kept(found, own):.1f} %", "" if seconds is None else f"{seconds:.1f}"]
    return f"| {name} | {' | '.join(shown)} |"


def under_stress(world: World, stressed: Mapping[str, Mapping[str, PreTrainedModel]]) -> str:
    """What merges keep of the experts where some of them are trained otherwise, and how these differ."""
    worlds = {Stress().about: world}
    worlds |= {about: World({**world.experts, **experts}, world.bases) for about, experts in stressed.items()}
    settings: dict[str, dict[str, Any]] = {
        f"`{rule}`": {"method": "identity", "corrections": (), "refit": False, "combine": rule}
        for rule in UNDER_STRESS
    }
    settings |= {
        "refit, no alignment": {"method": "identity", "refit": True},
        "`hf_zipit.merge(experts, calibration)`": {},
    }
    shares: dict[str, list[float]] = {name: [] for name in settings}
    for one in worlds.values():
        own = one.scores(one.experts, "test")
        for name, setting in settings.items():
            shares[name].append(kept(scored(one, setting)[0], own))
    lines = [f"| | {' | '.join(worlds)} |", f"| --- |{' ---: |' * len(worlds)}"]
    for name, found in sorted(shares.items(), key=lambda item: -item[1][0]):
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in found)} |")
    return "\n".join([*(_told(about, world, stressed[about]) for about in stressed), "", *lines])


def _told(about: str, world: World, experts: Mapping[str, PreTrainedModel]) -> str:
    """How far experts are from their base, how sure they are, and how right, against those of the same tasks."""

    def told(found: Mapping[str, PreTrainedModel]) -> tuple[float, float, float]:
        norms, sure = [], []
        for task, expert in found.items():
            base = world.bases[task].base_model.state_dict()
            steps = [(x - base[name]).square().sum() for name, x in expert.base_model.state_dict().items()]
            norms.append(float(torch.stack(steps).sum().sqrt()))
            images = rows(_data(task, "test"), slice(PARTS["test"]))["pixel_values"]
            with torch.no_grad():
                sure.append(float(expert(pixel_values=images).logits.softmax(-1).amax(-1).mean()))
        right = World(found, world.bases).scores(found, "test").values()
        return sum(norms) / len(norms), sum(sure) / len(sure), sum(right) / len(right)

    (norm, sure, right), (norm_before, sure_before, right_before) = (
        told(experts),
        told({task: world.experts[task] for task in experts}),
    )
    return (
        f"Experts {about} ({', '.join(experts)}): their steps from the base are {norm / norm_before:.1f} times as "
        f"long, "
        f"their mean confidence is {sure:.2f} (before: {sure_before:.2f}), their mean accuracy {right:.3f} "
        f"({right_before:.3f}).\n"
    )


def worlds(folder: Path | None, sections: Collection[str]) -> dict[str, Callable[[], str]]:
    """By title what makes a section; experts that only others need are not trained."""
    base = cache(lambda seed: stored(folder, f"base-{seed}", partial(trained_base, seed)))

    def expert(task: str, seed: int, number: int, stress: Stress = PLAIN) -> PreTrainedModel:
        name = f"{task}-{seed}" + (f"-{stress.about.replace(' ', '-')}" if stress.about != PLAIN.about else "")
        return stored(folder, name, lambda: trained_expert(task, base(seed), number, stress))

    @cache
    def one_base(count: int) -> World:
        tasks = (*TASKS, *BASE_TASKS)[:count]
        found = {t: expert(t, SEEDS[0], 10 + i) for i, t in enumerate(tasks)}
        return World(found, dict.fromkeys(tasks, base(SEEDS[0])))

    def mixed() -> World:
        others = {t: expert(t, SEEDS[1], 20 + i) for i, t in enumerate(TASKS[2:])}
        found = {**{t: one_base(4).experts[t] for t in TASKS[:2]}, **others}
        return World(found, {t: base(SEEDS[i >= 2]) for i, t in enumerate(TASKS)})

    def stressed() -> dict[str, dict[str, PreTrainedModel]]:
        return {s.about: {t: expert(t, SEEDS[0], 10 + TASKS.index(t), s) for t in STRESSED} for s in STRESSES}

    made: dict[str, Callable[[], str]] = {
        "Two tasks, one base": lambda: same_base(one_base(2)),
        "Two tasks, one base, the task known": lambda: by_task(one_base(2)),
        "Two tasks, one base, the task unknown": lambda: unknown_tasks(one_base(2)),
        "Four tasks, one base": lambda: same_base(one_base(4)),
        "Four tasks, one base, the task known": lambda: by_task(one_base(4)),
        "Four tasks, one base, the task unknown": lambda: unknown_tasks(one_base(4)),
        "Four tasks, one base, under stress": lambda: under_stress(one_base(4), stressed()),
        "Four tasks, two bases": lambda: two_bases(mixed()),
        "Four tasks, two bases, the task known": lambda: by_task(mixed(), "weights"),
        "Eight tasks, one base": lambda: same_base(one_base(8), OF_EIGHT),
        "Eight tasks, one base, the task known": lambda: by_task(one_base(8)),
    }
    if unknown := [title for title in sections if title not in made]:
        raise typer.BadParameter(f"there is no section {unknown[0]!r}; the sections are {', '.join(made)}")
    return {title: make for title, make in made.items() if not sections or title in sections}


def sections_of(text: str) -> tuple[str, dict[str, str]]:
    """The lines above the first section, and the sections by title."""
    above, *parts = text.split("\n## ")
    return above.strip(), {title: content.strip() for title, _, content in (part.partition("\n") for part in parts)}


def main(
    path: Path | None = typer.Argument(None, help="The page that gets the tables."),  # noqa: B008
    section: list[str] = typer.Option((), help="Sections to make, all by default; the page keeps its others."),  # noqa: B008
    models: Path | None = typer.Option(None, help="A folder to keep trained models in, and to read them from."),  # noqa: B008
) -> None:
    """Train the bases and experts, merge them in every way, and print the tables or write them into a page."""
    disable_progress_bar()
    set_verbosity_error()
    started = time.process_time()
    done: dict[str, str] = {}
    for title, make in worlds(models, section).items():
        begun = time.process_time()
        done[title] = f"{make()}\n\nSources {sources()}, {time.process_time() - begun:.0f} CPU s."
        typer.echo(f"{title}\n\n{done[title]}\n")
    if path is None:
        return
    about = (
        f"Made by `python -m benchmarks.same_base` (sources {sources()}) on {machine()}, "
        f"{time.process_time() - started:.0f} CPU s. Seeds of the bases {SEEDS[0]} "
        f"and {SEEDS[1]}; {PARTS['validation']} validation images of every task, at most {PARTS['test']} test images; "
        f"{CALIBRATION} unlabelled images of every task for what reads data."
    )
    above, _, below = path.read_text(encoding="utf-8").partition(MARK)
    about_before, before = sections_of(below)
    found = {**before, **done} if section else done
    titles = [title for title in worlds(None, ()) if title in found]
    text = "\n\n".join([about_before if section else about, *(f"## {title}\n\n{found[title]}" for title in titles)])
    write_text(path, f"{above}{MARK}\n\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
