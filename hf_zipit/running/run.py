"""Running a recipe: experts, one pass over the data, every method at every depth, the measurements, the kept model.

Invariants: nothing is written over an earlier result until the new one is complete, and the experts are observed
once, however many merges follow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.evaluation.measure import accuracy, evaluate
from hf_zipit.evaluation.results import Evaluation, Measurement
from hf_zipit.merging import merge, plan
from hf_zipit.observation.shared import SharedMoments
from hf_zipit.planning.plan import Plan
from hf_zipit.recipe.sections import Recipe
from hf_zipit.running.agreement import agreement_data
from hf_zipit.running.data import calibration_data, recipe_data, unlabelled
from hf_zipit.running.emissions import Emitted, emissions
from hf_zipit.running.experts import Say, recipe_experts
from hf_zipit.running.results import RunResult
from hf_zipit.running.writing import write_all, write_model

Save = Literal["all", "model", "nothing"]


def plan_recipe(recipe: Recipe, say: Say = lambda _: None) -> dict[tuple[str, float | str], Plan]:
    """What a run would do, by method and depth. Experts that it would train are made, but not trained."""
    return _plans(recipe, recipe_experts(recipe, say, train=False, as_stored=True))


def _plans(recipe: Recipe, experts: Mapping[str, PreTrainedModel]) -> dict[tuple[str, float | str], Plan]:
    data = recipe.calibration is not None
    return {point: plan(experts, config, base=recipe.base, data=data) for point, config in recipe.configs.items()}


def run_recipe(recipe: Recipe, *, save: Save = "all", say: Say = lambda _: None, co2: str | None = None) -> RunResult:
    """Run a recipe.

    Args:
        recipe: what to do, from `load_recipe`.
        save: `"all"` writes the results, the picture, the trained experts and the kept model with its card into the
            recipe's folder; `"model"` only the model, as that folder.
        say: is told in a few words what is being done.
        co2: the country where the machine stands, by its ISO code of three letters: the card then says what the run
            emitted, as codecarbon estimates it.

    Raises:
        ZipItError: its subclasses say what is wrong with the experts, the data, the recipe or the output folder.
    """
    with cpu_threads(recipe.threads), emissions(co2) as emitted:
        return _run(recipe, save, say, emitted)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with `count` CPU threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(recipe: Recipe, save: Save, say: Say, emitted: Emitted) -> RunResult:
    experts = recipe_experts(recipe, say, train=True, as_stored=recipe.runs_nothing)
    plans = _plans(recipe, experts)
    calibration = None
    if recipe.calibration:
        data = unlabelled(calibration_data(recipe, experts, say))
        given = recipe.calibration
        calibration = Calibration(data, batch_size=given.batch_size, memory_gb=given.memory_gb).read(experts)
    evaluation = recipe_data(recipe, recipe.evaluation, experts, say) if recipe.evaluation else None
    checks = agreement_data(recipe, experts, calibration) if calibration and not evaluation else None
    shared = SharedMoments(experts, calibration, recipe.depth)
    if any(planned.passes for planned in plans.values()):
        say("observing the experts on the calibration data")
    moments = {point: shared.moments(planned) for point, planned in plans.items()}

    def measured(model: PreTrainedModel | Mapping[str, PreTrainedModel]) -> Evaluation:
        if evaluation is None:
            return Evaluation(None)
        return evaluate(model, evaluation, metrics=recipe.evaluation.metrics, batch_size=recipe.evaluation.batch_size)

    if evaluation:
        say("measuring the experts")
    beside = measured(experts)
    rows, kept_row, kept_model = [], None, None
    writes = save != "nothing" and PartialState().is_main_process  # all processes have the same result
    folder = recipe.folder if save == "model" else recipe.folder / "model"
    for (method, depth), config in recipe.configs.items():
        say(f"merging: {method}, depth {depth}")
        started = time.perf_counter()
        kept = (method, depth) == (recipe.kept.method, recipe.kept.depth)
        merged = merge(
            experts, calibration, config, base=recipe.base, moments=moments[method, depth],
            output_dir=folder if writes and kept and recipe.runs_nothing else None,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        found = measured(merged)
        share = depth if merged.config.depth is None else merged.config.depth
        agreement = accuracy(merged, checks.tasks) if checks else None
        rows.append(
            Measurement(
                method,
                share,
                merged.num_parameters(),
                found.model,
                seconds,
                found.scores,
                agreement,
                found.compared(beside),
            )
        )
        if kept:
            kept_row, kept_model = rows[-1], merged
    total = sum(expert.num_parameters() for expert in experts.values())
    result = RunResult(recipe, beside.model, total, tuple(rows), kept_row, beside.scores)
    if not writes:
        return result
    say(f"writing to {recipe.folder}")
    if (found := emitted()) is not None:
        kept_model.config.method["emissions"] = found
    if save == "model":
        return write_model(result, kept_model, folder)
    return write_all(result, kept_model, experts, say)
