"""Search: try many settings of a merge on held-out calibration data, and keep those that nothing beats.

The calibration data is divided first: one part is what merges read (moments, refit), the other only scores them. Test
data has no place in the signature. The experts are observed once, for the deepest merge of the space. The score is an
accuracy on the held-out part: against labels, or against the answers of each task's own expert, which needs none.

`"grid"` runs all settings of the space, or a seeded sample of them. `"tpe"` lets Optuna's tree-structured Parzen
estimator choose (Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011; with several objectives
Ozaki et al., GECCO 2020): it looks for high scores, few parameters and little computation at once.

Invariants: the same seed gives the same trials; a merge that fails is a trial with a sentence, not the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.logging import tqdm

from hf_zipit.config import MergeConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.data.held_out import Answers, HeldOut, held_out, read_divided
from hf_zipit.errors import RecipeError, ZipItError
from hf_zipit.evaluation.measure import accuracy
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.extras import require
from hf_zipit.merging import merge, plan, split_settings
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.shared import SharedMoments
from hf_zipit.planning.plan import make_plan
from hf_zipit.searching.costs import expert_macs, merged_macs
from hf_zipit.searching.result import SearchResult, Trial
from hf_zipit.searching.space import Choices, Choose, Range, SearchSpace, Setting
from hf_zipit.symmetry.spec import MergeSpec

Sampler = Literal["grid", "tpe"]
Score = Literal["mean", "joint"] | Callable[[PreTrainedModel], float]

TRIALS = 30
"""Trials of a tpe search that names no number."""

ASKS = 10
"""So many proposals in a row that were tried before end a tpe search: its space is as good as empty."""


def search(
    experts: Experts,
    calibration: Any,
    config: MergeConfig | Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    validation: Any = None,
    space: Mapping[str, Any] | SearchSpace | None = None,
    sampler: Sampler = "grid",
    trials: int | None = None,
    hold_out: float = 0.25,
    score: Score = "mean",
    answers: Answers = "auto",
    max_size: float | None = None,
    moments: Moments | str | Path | None = None,
    accelerator: Accelerator | None = None,
    watch: Callable[[Trial], None] = lambda trial: None,
    **settings: Any,
) -> SearchResult:
    """Merge the same experts in many ways, and score every merge on data that no merge has read.

    Args:
        experts: the models by task name, as for `merge`.
        calibration: a little data, as for `merge`; never test data. Labels are used for nothing but the score.
        config: what all merges have in common; or its fields as keywords. Its `seed` is also that of the division of
            the data and of the sampler.
        base: as for `merge`.
        validation: data to score on, of the same kinds; without it a part of the calibration data is held out.
        space: what to try, as in `searching.space`; permute and zip at two depths by default.
        sampler: `"grid"` or `"tpe"`.
        trials: at most this many different merges; the whole grid by default, or 30 by tpe.
        hold_out: the share of every task's calibration samples that only scores.
        score: `"mean"` of the tasks' accuracies, `"joint"` accuracy among the classes of all tasks, or a function of
            the merged model, which should read no test data either.
        answers: who says what is right: the data's `"labels"` (ids of each task's own classes), the `"experts"`, or
            `"auto"`: labels where every task has them.
        max_size: `SearchResult.best` has at most this multiple of the parameters of one expert.
        moments: of the same experts, at least as deep as the space; nothing is observed then. They should not have
            been taken from the samples that score.
        accelerator: where to run.
        watch: is given every trial when it is done.
        settings: fields of `MergeConfig`, and `processor`, `columns` and `batch_size` of `Calibration`.

    Raises:
        ExpertError, SpecError: if the experts cannot be merged at all.
        DataError: if the data cannot be used or divided.
        RecipeError: if the space or a setting of the search is wrong, or the optional Optuna is not installed.
    """
    reading, settings = split_settings(settings)
    common = {**(config.to_dict() if isinstance(config, MergeConfig) else config or {}), **settings}
    seed = MergeConfig.of(common).seed
    space = SearchSpace.of(space)
    _check(sampler, trials, score, max_size)
    grid = _grid(space, trials, seed) if sampler == "grid" else None
    loaded = load_experts(experts)
    first = next(iter(loaded.values()))
    for depth in _depths(space):
        make_plan(loaded, MergeConfig(depth=depth))
    data, held = read_divided(calibration, validation, loaded, hold_out, seed, accelerator=accelerator, **reading)
    samples = None if callable(score) else held_out(held, loaded, answers=answers)
    task = _Task(loaded, data, SharedMoments(loaded, data, _depths(space), moments), score, samples, common, base)
    done: list[Trial] = []
    with tqdm(total=trials or TRIALS if grid is None else len(grid), desc="searching", unit="merge") as bar:

        def run(setting: Setting) -> Trial:
            trial = task.run(len(done), setting)
            done.append(trial)
            watch(trial)
            bar.update()
            return trial

        if grid is None:
            _tpe(space, trials or TRIALS, seed, run)
        else:
            for setting in grid:
                run(setting)
    beside = accuracy(loaded, samples.tasks, batch_size=data.batch_size) if samples else None
    spec = MergeSpec.from_model(first)
    return SearchResult(
        tuple(done), "own" if callable(score) else score, samples.answers if samples else None,
        samples.counts if samples else {}, beside, first.num_parameters(), expert_macs(spec), sampler, seed, max_size,
    )  # fmt: skip


def _check(sampler: str, trials: int | None, score: Any, max_size: float | None) -> None:
    if sampler not in ("grid", "tpe"):
        raise RecipeError(f"sampler is {sampler!r}; it must be 'grid' or 'tpe'.")
    if trials is not None and trials < 1:
        raise RecipeError(f"trials is {trials}; it must be at least 1.")
    if not callable(score) and score not in ("mean", "joint"):
        raise RecipeError(f"score is {score!r}; it must be 'mean', 'joint' or a function of the merged model.")
    if max_size is not None and max_size <= 0:
        raise RecipeError(f"max_size is {max_size}; it must be above 0.")
    if sampler == "tpe":
        require("optuna")


def _depths(space: SearchSpace) -> tuple[float | str, ...]:
    return (space.depth.high,) if isinstance(space.depth, Range) else space.depth


@dataclass(frozen=True)
class _Task:
    """The merges of one search: everything but the setting."""

    experts: Mapping[str, PreTrainedModel]
    calibration: Calibration
    moments: SharedMoments
    score: Score
    samples: HeldOut | None
    common: Mapping[str, Any]
    base: Any = None

    def run(self, number: int, setting: Setting) -> Trial:
        """Merge and score; an error that a user can see becomes the trial's."""
        started = time.perf_counter()
        try:
            config = setting.config(self.common)
            found = self.moments.moments(plan(self.experts, config, base=self.base))
            started = time.perf_counter()  # all merges share the observation
            with no_bars():
                merged = merge(self.experts, self.calibration, config, base=self.base, moments=found)
            seconds = time.perf_counter() - started
            measured, score = self._scored(merged)
        except ZipItError as error:
            return Trial(number, setting, seconds=time.perf_counter() - started, error=" ".join(str(error).split()))
        first = next(iter(self.experts.values()))
        macs = merged_macs(MergeSpec.from_model(first), merged.config, first)
        return Trial(number, setting, score, measured, merged.num_parameters(), macs, seconds)

    def _scored(self, merged: PreTrainedModel) -> tuple[Any, float]:
        if callable(self.score):
            return None, float(self.score(merged))
        found = accuracy(merged, self.samples.tasks, batch_size=self.calibration.batch_size)
        if self.score == "mean":
            return found, found.mean
        if found.joint is None:
            raise RecipeError("The tasks share their classes, so that there is no joint accuracy; score by 'mean'.")
        return found, found.joint


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars inside the search's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _grid(space: SearchSpace, trials: int | None, seed: int) -> list[Setting]:
    """All settings of a space, or a seeded sample of them in the grid's order."""
    settings = space.grid()
    if trials is None or trials >= len(settings):
        return settings
    return [settings[i] for i in sorted(np.random.default_rng(seed).permutation(len(settings))[:trials])]


def _tpe(space: SearchSpace, total: int, seed: int, run: Callable[[Setting], Trial]) -> None:
    """Run what Optuna proposes from the trials before."""
    import optuna

    known: dict[str, Trial] = {}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            directions=("maximize", "minimize", "minimize"), sampler=optuna.samplers.TPESampler(seed=seed)
        )
        repeated = 0
        while len(known) < total and repeated < ASKS:
            asked = study.ask()
            setting = space.draw(_choose(asked))
            key = str(setting.to_dict())
            repeated = repeated + 1 if key in known else 0
            trial = known[key] = known.get(key) or run(setting)
            if trial.score is None:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(asked, (trial.score, trial.parameters, trial.macs))
    finally:
        optuna.logging.set_verbosity(verbosity)


def _choose(asked: Any) -> Choose:
    """Optuna's choice of one value."""

    def choose(name: str, values: Choices) -> Any:
        if not isinstance(values, Range):
            return asked.suggest_categorical(name, values)
        whole_numbers = isinstance(values.low, int) and isinstance(values.high, int)
        suggest = asked.suggest_int if whole_numbers else asked.suggest_float
        return suggest(name, values.low, values.high, log=values.log)

    return choose
