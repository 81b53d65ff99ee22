"""The loss around two experts and their merge: on the line between the aligned experts, and in a plane with the merge.

Two experts that were trained apart lie in different basins; averaging their weights lands on the barrier between them.
Alignment brings expert b's units into a's places, and if the experts are alike up to a symmetry the barrier is gone
(Git Re-Basin, arXiv 2209.04836; for experts of different tasks MuDSC, CVPR 2024). Here the weights of the trunk are
moved and every task's loss is measured through that task's own branch, at its own entry.

*Aligned expert*: its trunk in the merged units, T M_t W_t U_t. One-to-one maps and changes of basis only move it: it
computes what the expert computes. Where units were joined (zip) it does not, and the ends of the line are what the
experts' weights become in merged units, not the experts themselves; `exact` tells.

*Barrier* of a task: the largest excess, on the line, of its loss over the straight line between the losses at the
ends. *Plane*: through both aligned experts and the merge, the axes orthogonal, in units of the experts' distance. An
average lies on the line between them; then the second axis is a seeded random direction, with the size of b - a
tensor by tensor (after Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_zipit.align.maps import Alignment, SpaceMap
from hf_zipit.combine.transform import to_merged, unmerge_matrix
from hf_zipit.errors import ExpertError, RecipeError
from hf_zipit.evaluation import IGNORED
from hf_zipit.experts import Experts, load_experts
from hf_zipit.files import replacing, write_json
from hf_zipit.held_out import Answers, HeldOut, divide, held_out, limit, whole
from hf_zipit.merging import align_trunk, in_float32, merge, moments_for, plan, refit_settings
from hf_zipit.modeling.entries import DenseEntry
from hf_zipit.observe import Moments
from hf_zipit.observe.data import by_task
from hf_zipit.observe.inputs import ModelInputs
from hf_zipit.observing import Observed
from hf_zipit.planning import Plan, fold_experts
from hf_zipit.recipe import REFIT
from hf_zipit.refit import RefitConfig
from hf_zipit.registry import suggestion
from hf_zipit.symmetry.proof import model_tensors

RESULTS, CONTOURS, CURVES = "landscape.json", "landscape.png", "interpolation.png"

ON_THE_LINE = 1e-4
"""A merge that is nearer to the line between the experts than this share of their distance spans no plane with it."""


@dataclass(frozen=True)
class Measured:
    """Losses (mean cross-entropy) and errors (shares of wrong answers) at the points of a line or grid, by task."""

    loss: Mapping[str, tuple[Any, ...]]
    error: Mapping[str, tuple[Any, ...]]

    def to_dict(self) -> dict[str, Any]:
        return {"loss": _plain(self.loss), "error": _plain(self.error)}


@dataclass(frozen=True)
class Curve(Measured):
    """What is measured on the line between two aligned experts.

    Attributes:
        method: how they were aligned; `"identity"` is naive interpolation.
        at: the places on the line, from 0, the first expert, to 1, the second.
        exact: whether the aligned experts compute what the experts compute.
    """

    method: str
    at: tuple[float, ...]
    exact: bool

    def barrier(self, task: str) -> float:
        """The largest excess of the task's loss over the straight line between the ends; 0 or more."""
        return barrier(self.at, self.loss[task])

    @property
    def mean_barrier(self) -> float:
        """The barrier of the tasks' mean loss."""
        return barrier(self.at, [sum(values) / len(values) for values in zip(*self.loss.values(), strict=True)])

    def to_dict(self) -> dict[str, Any]:
        barriers = {task: self.barrier(task) for task in self.loss}
        return {
            "method": self.method,
            "exact": self.exact,
            "at": list(self.at),
            **super().to_dict(),
            "barrier": _plain(barriers),
            "mean_barrier": _plain(self.mean_barrier),
        }


@dataclass(frozen=True)
class Plane(Measured):
    """What is measured in a plane; `loss[task][row][column]` is the loss at `(x[column], y[row])`.

    Attributes:
        points: the aligned experts and the merge, by name; in units of the distance between the aligned experts.
        x, y: the grid's places on both axes.
        through_merge: whether the merge spans the second axis; else it is a random direction.
    """

    points: Mapping[str, tuple[float, float]]
    x: tuple[float, ...]
    y: tuple[float, ...]
    through_merge: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "points": {name: list(point) for name, point in self.points.items()},
            "x": list(self.x),
            "y": list(self.y),
            "through_merge": self.through_merge,
            **super().to_dict(),
        }


@dataclass(frozen=True)
class Landscape:
    """The loss around two experts and a merge.

    Attributes:
        pair: the two experts' tasks.
        method, depth: of the merge; the method as recipes name it, with `+refit` where it was refitted.
        answers, samples: who said what is right, and the number of samples by task.
        aligned: the line between the aligned experts.
        naive: the line between the experts as they are; None where the method is plain averaging.
        plane: None where no grid was asked for.
    """

    pair: tuple[str, str]
    method: str
    depth: float
    answers: str
    samples: Mapping[str, int]
    aligned: Curve
    naive: Curve | None
    plane: Plane | None

    @property
    def curves(self) -> list[Curve]:
        """The lines that were measured."""
        return [self.aligned, *([self.naive] if self.naive else [])]

    def to_dict(self) -> dict[str, Any]:
        return {
            "pair": list(self.pair),
            "method": self.method,
            "depth": self.depth,
            "answers": self.answers,
            "samples": dict(self.samples),
            "interpolation": [curve.to_dict() for curve in self.curves],
            "plane": self.plane.to_dict() if self.plane else None,
        }

    def save(self, folder: str | Path, *, title: str = "") -> Path:
        """Write the numbers (`landscape.json`), the curves (`interpolation.png`) and the contours (`landscape.png`).

        Raises:
            OutputError: if the folder cannot be written.
        """
        from hf_zipit.report.landscape import contours, interpolation

        folder = Path(folder)
        write_json(folder / RESULTS, self.to_dict())
        pictures = {CURVES: interpolation} | ({CONTOURS: contours} if self.plane else {})
        for name, draw in pictures.items():
            with replacing(folder / name) as beside:
                draw(self, title=title).savefig(beside, format="png", dpi=160)
        return folder


def landscape(
    experts: Experts,
    calibration: Any,
    *,
    validation: Any = None,
    method: str = "weights",
    options: Mapping[str, Any] | None = None,
    depth: float | str = 1.0,
    residual: str = "match",
    overrides: Mapping[str, Any] | None = None,
    combine: str = "average",
    refit: bool | RefitConfig | Mapping[str, Any] = False,
    pair: Sequence[str] | None = None,
    grid: int = 13,
    margin: float = 0.35,
    steps: int = 11,
    samples: int = 128,
    hold_out: float = 0.25,
    answers: Answers = "auto",
    processor: Any = None,
    batch_size: int = 64,
    moments: Moments | str | Path | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Landscape:
    """Measure the loss around two experts and their merge.

    Args:
        experts: the models by task name, as for `merge`.
        calibration: a little data: one part is what the merge looks at, if it needs data, another is measured on.
        validation: data to measure on, in place of a part of the calibration data.
        method, options, depth, residual, overrides, combine, refit: of the merge, as for `merge`. Corrections belong
            to one point, not to a plane, and are left out.
        pair: the tasks of the two experts; the first two by default.
        grid: points on each axis of the plane, 2 or more; 0 for no plane. Every point runs all samples once.
        margin: how far the plane goes beyond the points, in distances of the experts.
        steps: points on the line, 3 or more; an odd number includes the middle.
        samples: of each task, at most, that are measured on.
        hold_out: the share of the calibration data that is measured on.
        answers: `"labels"`, `"experts"` or `"auto"`: see `hf_zipit.search`.
        processor: image processor or tokenizer for raw data.
        batch_size: samples per forward pass.
        moments: of the same experts, as for `merge`.
        accelerator: where the experts are observed; the losses are measured where `merge` leaves the model.
        seed: of everything that is drawn.
        progress: show progress bars on stderr.

    Raises:
        ExpertError: if the experts do not fit each other, or their aligned trunks are the same.
        DataError, RecipeError, SpecError: as `merge` and `search` do.
    """
    if steps < 3 or grid < 0 or grid == 1 or samples < 1:
        raise RecipeError(
            f"steps, grid and samples are {steps}, {grid} and {samples}; there must be 3 or more steps, 2 or more "
            "points on an axis (or 0, for no plane), and 1 or more samples."
        )
    survey = Survey.of(
        experts, calibration, validation, samples=samples, hold_out=hold_out, answers=answers, processor=processor,
        batch_size=batch_size, moments=moments, accelerator=accelerator, seed=seed, progress=progress,
    )  # fmt: skip
    chosen = survey.pair(pair)
    surface = survey.surface(
        chosen, method=method, options=options, depth=depth, residual=residual, overrides=overrides, combine=combine,
        refit=refit,
    )  # fmt: skip
    aligned = survey.curve(surface, steps)
    plane = survey.plane(surface, grid, margin) if grid else None
    naive = None
    if method != "identity":
        naive = survey.curve(survey.surface(chosen, method="identity", depth=depth), steps)
    name = f"{method}{REFIT}" if refit_settings(refit) else method
    return Landscape(
        chosen, name, surface.depth, survey.held.answers, survey.held.counts, aligned, naive, plane
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- the surface


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor of the merged model, `targets` being all its copies there, and how it moves with x and y.

    Attributes:
        positive: whether it must not become negative, as a running variance.
    """

    targets: Sequence[Tensor]
    base: Tensor
    east: Tensor
    north: Tensor
    positive: bool

    def put(self, x: float, y: float) -> None:
        moved = self.base + x * self.east + y * self.north
        for target in self.targets:
            target.copy_(moved.clamp_min(0) if self.positive else moved)


@dataclass(frozen=True, eq=False)
class Surface:
    """One merged model whose weights are overwritten, point by point.

    Attributes:
        method, depth: of the merge.
        model: the model; `move` changes it.
        places: what `move` changes.
        points: the aligned experts and the merge, by name.
        exact: whether the aligned experts compute what the experts compute.
        through_merge: whether the merge spans the second axis.
    """

    method: str
    depth: float
    model: PreTrainedModel
    places: Sequence[Place]
    points: Mapping[str, tuple[float, float]]
    exact: bool
    through_merge: bool

    @torch.no_grad()
    def move(self, x: float, y: float = 0.0) -> PreTrainedModel:
        """The model at a point: `a + x (b - a) + y * north`."""
        for place in self.places:
            place.put(x, y)
        return self.model


@torch.no_grad()
def make_surface(
    experts: Mapping[str, PreTrainedModel],
    planned: Plan,
    alignment: Alignment,
    merged: PreTrainedModel,
    pair: tuple[str, str],
    *,
    method: str,
    seed: int = 0,
) -> Surface:
    """The plane through two aligned experts and a merge.

    Args:
        experts: the experts by task, with their norms folded where the plan says so.
        planned, alignment: of the merge.
        merged: what came out; it is changed from now on.
        pair: the tasks of the two experts.
        method: the name of the method.
        seed: of the random direction where the merge is on the line between the experts.

    Raises:
        ExpertError: if the aligned trunks are the same.
    """
    moves = [*_trunk(experts, planned, alignment, merged, pair), *_doors(planned, alignment, merged)]
    length = _inner((move.east, move.east) for move in moves if move.counts)
    if not length > 0:
        raise ExpertError(
            f"the aligned trunks of the experts {pair[0]!r} and {pair[1]!r} are the same, with no line between them; "
            "choose other experts"
        )
    share = _inner((move.to_merge, move.east) for move in moves if move.counts) / length
    norths = [move.to_merge - share * move.east for move in moves]
    off = math.sqrt(_inner((n, n) for n, move in zip(norths, moves, strict=True) if move.counts) / length)
    through_merge = off > ON_THE_LINE
    if through_merge:
        norths = [north / off for north in norths]
    else:
        norths, off = _random_norths(moves, length, seed), 0.0
    places = [
        Place(move.targets, move.base, move.east, north, not move.counts and move.never_negative())
        for move, north in zip(moves, norths, strict=True)
    ]
    points = {pair[0]: (0.0, 0.0), pair[1]: (1.0, 0.0), "merge": (share, off)}
    return Surface(method, planned.cut.depth, merged, places, points, _is_exact(alignment), through_merge)


@dataclass(frozen=True, eq=False)
class _Move:
    """A tensor's value at the first expert, and from there the way to the second and to the merge.

    Attributes:
        targets: all its copies in the merged model.
        counts: whether it has a part in distances: parameters have, statistics have not.
    """

    targets: Sequence[Tensor]
    base: Tensor
    east: Tensor
    to_merge: Tensor
    counts: bool

    @classmethod
    def between(cls, targets: Sequence[Tensor], a: Tensor, b: Tensor, counts: bool = True) -> _Move:
        return cls(targets, a, b - a, targets[0] - a, counts)

    def never_negative(self) -> bool:
        """Whether it is positive at all three, as a running variance is."""
        ends = (self.base, self.base + self.east, self.base + self.to_merge)
        return all(bool((value >= 0).all()) for value in ends)


def _trunk(
    experts: Mapping[str, PreTrainedModel], planned: Plan, alignment: Alignment, merged: PreTrainedModel, pair: Any
) -> Iterator[_Move]:
    """Every tensor of the trunk that something reads."""
    spec, tasks = planned.spec, list(experts)
    numbers = [tasks.index(task) for task in pair]
    sources = [model_tensors(experts[task]) for task in pair]
    parameters = {name for name, _ in experts[pair[0]].named_parameters(remove_duplicate=False)}
    trunk = model_tensors(merged.trunk)
    branches = [model_tensors(merged.branch(task)) for task in tasks]
    for name in sorted(planned.cut.trunk):
        labels = spec.axes.get(name)
        if labels is None or not sources[0][name].is_floating_point():
            continue
        # A tensor of the trunk that hangs beside blocks, in no module of its own, is held by every branch.
        targets = [trunk[name]] if name in trunk else [branch[name] for branch in branches]
        ends = (
            to_merged(in_float32(source[name]), labels, alignment, spec, number).to(targets[0])
            for source, number in zip(sources, numbers, strict=True)
        )
        yield _Move.between(targets, *ends, counts=name in parameters)


def _doors(planned: Plan, alignment: Alignment, merged: PreTrainedModel) -> Iterator[_Move]:
    """Fitted doors belong to the merge; the aligned experts are read through U_t."""
    for number, task in enumerate(planned.tasks):
        key = merged.branch_names[task]
        pairs = [*zip(planned.cut.entries, merged.entries[key], strict=True)]
        pairs += zip(planned.cut.exits, merged.exits[key], strict=True)
        for entry, door in pairs:
            if isinstance(door, DenseEntry):
                plain = unmerge_matrix(alignment, entry.key, number, planned.spec).to(door.weight)
                zeros = torch.zeros_like(door.bias)
                yield _Move.between([door.weight], plain, plain)
                yield _Move.between([door.bias], zeros, zeros)


def _random_norths(moves: Sequence[_Move], length: float, seed: int) -> list[Tensor]:
    """A random direction at a right angle to east, as long as it, in every tensor about as long as it is there."""
    generator = torch.Generator().manual_seed(seed)
    norths = []
    for move in moves:
        drawn = torch.randn(move.east.shape, generator=generator).to(move.east)
        norths.append(drawn * (move.counts * move.east.norm() / drawn.norm().clamp_min(1e-12)))
    slant = _inner(zip(norths, (move.east for move in moves), strict=True)) / length
    norths = [north - move.counts * slant * move.east for north, move in zip(norths, moves, strict=True)]
    scale = math.sqrt(length / _inner((north, north) for north in norths))
    return [north * scale for north in norths]


def _inner(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The inner product of two directions, summed over their tensors."""
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def _is_exact(alignment: Alignment) -> bool:
    """Whether every map moves an expert's units without joining or dropping any."""

    def one_to_one(space_map: Any) -> bool:
        if not isinstance(space_map, SpaceMap):
            return True  # an invertible change of basis
        labels = space_map.labels
        every = torch.arange(space_map.size).expand(*labels.shape[:-1], -1)
        return labels.shape[-1] == space_map.size and torch.equal(labels.sort(-1).values, every)

    return all(one_to_one(space_map) for space_map in alignment.values())


# --------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class Survey:
    """Experts, the data that merges may look at, and the samples that losses are measured on."""

    experts: Mapping[str, PreTrainedModel]
    calibration: Any
    held: HeldOut
    processor: Any = None
    batch_size: int = 64
    moments: Moments | str | Path | None = None
    accelerator: Accelerator | None = None
    seed: int = 0
    progress: bool = True
    _observed: dict[float | str, Observed] = field(default_factory=dict)

    @classmethod
    def of(
        cls, experts: Experts, calibration: Any, validation: Any = None, *, samples: int = 128,
        hold_out: float = 0.25, answers: Answers = "auto", seed: int = 0, **settings: Any,
    ) -> Survey:  # fmt: skip
        """Load the experts and divide the data; see `landscape`."""
        loaded = load_experts(experts)
        first, tasks = next(iter(loaded.values())), list(loaded)
        if validation is None:
            rest, part = divide(calibration, first, tasks, hold_out, seed)
            calibration = whole(rest)
        else:
            part = by_task(validation, ModelInputs.of(first), tasks)
        part = limit(whole(part), first, tasks, samples, seed)
        kept = {name: settings[name] for name in ("processor", "batch_size") if name in settings}
        held = held_out(part, loaded, answers=answers, **kept)
        return cls(loaded, calibration, held, seed=seed, **settings)

    def pair(self, wanted: Sequence[str] | None) -> tuple[str, str]:
        """The tasks of two experts, the first two by default."""
        tasks = list(self.experts)
        chosen = list(wanted or tasks[:2])
        for task in chosen:
            if task not in tasks:
                raise RecipeError(f"There is no expert {task!r}; {suggestion(task, tasks)}")
        if len(set(chosen)) != 2 or len(chosen) != 2:
            raise RecipeError(f"A line runs between two different experts, not between {chosen}.")
        return chosen[0], chosen[1]

    def surface(self, pair: tuple[str, str], *, method: str, **settings: Any) -> Surface:
        """Merge, and lay the plane through two experts; `settings` are those of `merge`."""
        refit = refit_settings(settings.pop("refit", False))
        planned = plan(self.experts, method=method, **settings)
        if not planned.cut.trunk:
            raise RecipeError("At this depth nothing is shared, so that there is nothing to move; take a larger one.")
        depth = settings.get("depth", 1.0)
        observed = self._observed.setdefault(depth, self._observe(depth))
        found = observed.moments(planned)
        folded = fold_experts(self.experts, planned)
        aligning = {name: settings[name] for name in ("options", "residual", "overrides") if name in settings}
        here = None if found is None else moments_for(folded, planned, None, found, None)
        alignment = align_trunk(folded, planned, here, method, **aligning)
        merged = merge(
            self.experts, self.calibration, method=method, refit=refit or False, processor=self.processor,
            batch_size=self.batch_size, moments=found, accelerator=self.accelerator, seed=self.seed,
            progress=self.progress, **settings,
        )  # fmt: skip
        return make_surface(folded, planned, alignment, merged, pair, method=method, seed=self.seed)

    def _observe(self, depth: float | str) -> Observed:
        """What serves all methods at one depth."""
        return Observed(
            self.experts, self.calibration, [depth], self.moments, processor=self.processor,
            batch_size=self.batch_size, accelerator=self.accelerator, seed=self.seed, progress=self.progress,
        )  # fmt: skip

    def curve(self, surface: Surface, steps: int) -> Curve:
        """Measure on the line between the aligned experts."""
        at = tuple(step / (steps - 1) for step in range(steps))
        found = self._measure(surface, [(x, 0.0) for x in at], f"line, {surface.method}")
        return Curve(found.loss, found.error, surface.method, at, surface.exact)

    def plane(self, surface: Surface, grid: int, margin: float) -> Plane:
        """Measure on a square grid around the experts and the merge."""
        across, up = zip(*surface.points.values(), strict=True)
        half = max(max(across) - min(across), max(up) - min(up)) / 2 + margin
        x, y = ([(min(v) + max(v)) / 2 + half * (2 * i / (grid - 1) - 1) for i in range(grid)] for v in (across, up))
        found = self._measure(surface, [(a, b) for b in y for a in x], f"plane, {surface.method}")
        rows = [
            {task: tuple(values[r * grid : (r + 1) * grid] for r in range(grid)) for task, values in kind.items()}
            for kind in (found.loss, found.error)
        ]
        return Plane(*rows, surface.points, tuple(x), tuple(y), surface.through_merge)

    def _measure(self, surface: Surface, points: Sequence[tuple[float, float]], what: str) -> Measured:
        found = []
        for point in tqdm(points, desc=what, unit="point", disable=not self.progress):
            found.append(losses(surface.move(*point), self.held, self.batch_size))
        tasks = list(self.held.tasks)
        return Measured(*({task: tuple(each[task][kind] for each in found) for task in tasks} for kind in (0, 1)))


@torch.inference_mode()
def losses(model: PreTrainedModel, held: HeldOut, batch_size: int = 64) -> dict[str, tuple[float, float]]:
    """By task the mean cross-entropy and the share of wrong answers, the task being known."""
    found = {}
    for task, columns in held.tasks.items():
        loss = wrong = count = 0.0
        for batch in columns.batches(batch_size):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels").flatten()
            logits = model(**batch, task=task).logits.flatten(0, -2).float()
            asked = labels != IGNORED
            loss += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            wrong += int((logits.argmax(-1) != labels)[asked].sum())
            count += int(asked.sum())
        found[task] = (loss / count, wrong / count)
    return found


def barrier(at: Sequence[float], loss: Sequence[float]) -> float:
    """The largest excess of a curve from `at[0]` = 0 to `at[-1]` = 1 over the straight line between its ends.

    0 or more, because the ends have none; Git Re-Basin, arXiv 2209.04836, definition 2.2.
    """
    return max(value - ((1 - x) * loss[0] + x * loss[-1]) for x, value in zip(at, loss, strict=True))


def _plain(value: Any) -> Any:
    """Numbers as JSON knows them: what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None


__all__ = ["Curve", "Landscape", "Plane", "Survey", "barrier", "landscape"]
