"""What commands print: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console

from hf_zipit.errors import RecipeError
from hf_zipit.recipe.sections import Recipe
from hf_zipit.running.results import RunResult


def print_plans(recipe: Recipe, as_json: bool, say: Any) -> None:
    from hf_zipit.report.costs import expected_costs
    from hf_zipit.report.tables import plans_table
    from hf_zipit.running.run import plan_recipe

    plans = plan_recipe(recipe, say)
    say("estimating")
    given, device = recipe.calibration, os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu")
    samples, memory = (given.samples, given.memory_gb) if given else (None, None)
    costs = {name: expected_costs(plan, samples, device, memory) for name, plan in plans.items()}
    if as_json:
        print_json(
            [{"method": name[0], **plan.to_dict(), "costs": costs[name].to_dict()} for name, plan in plans.items()]
        )
        return
    first = next(iter(plans.values()))
    console = stdout()
    console.print(plans_table(plans, title=f"{recipe.name}: {first.architecture}, tasks {', '.join(first.tasks)}"))
    if recipe.calibration and any(plan.passes for plan in plans.values()):
        number = recipe.calibration.samples
        samples = f"at most {number:,}" if number else "all"
        console.print(f"Observes {samples} samples of each task, once for all merges.")
    for (method, depth), found in costs.items():
        if len(costs) > 1:
            console.print(f"{method}, depth {depth}", soft_wrap=True)
        print_lines(found.lines())
    print_unknown_ops(first.spec.unknown_ops)


def print_unknown_ops(unknown_ops: Mapping[str, Sequence[str]]) -> None:
    """Operations that a trace met without a rule, by the modules that they are in."""
    for op, modules in unknown_ops.items():
        stdout().print(f"No rule for {op} in {', '.join(modules) or 'the model itself'}: what it touches is fixed.")


def print_result(result: RunResult, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    from hf_zipit.report.tables import EXPERTS, results_table, scores_table, summary

    console = stdout()
    console.print(results_table(result.rows, result.experts, result.expert_parameters, title=result.recipe.name))
    if result.expert_scores:
        rows = {f"{row.method}, depth {row.depth:g}": row.scores for row in result.rows}
        console.print(scores_table({EXPERTS: result.expert_scores, **rows}, title="metrics"))
    if result.kept and result.model:
        console.print(f"model    {result.model}  ({result.kept.method}, depth {result.kept.depth:g})", soft_wrap=True)
    if result.kept and (kept := summary(result.kept, result.experts)):
        console.print(f"kept     {kept}", soft_wrap=True)
    if result.refit:
        module, error = result.refit.worst(1)[0]
        told = f"relative error {result.refit.mean:.3f} on average, most in {module} ({error:.3f})"
        console.print(f"refit    {told}", soft_wrap=True)
        if rows := result.refit.rows_in_words():
            console.print(f"         on {rows}", soft_wrap=True)
    if result.plot:
        console.print(f"picture  {result.plot}", soft_wrap=True)
    if result.pushed:
        console.print(f"pushed   {result.pushed}", soft_wrap=True)


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        stdout().print(line, soft_wrap=True)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def stdout() -> Console:
    """Tables as wide as the terminal; where there is none, wide enough to be read whole."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


@contextmanager
def silence() -> Iterator[None]:
    """Print nothing on stdout."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def working(quiet: bool, device: str | None = None) -> Iterator[Any]:
    """Gives a function that says on stderr what is being done, and keeps other libraries' chatter away.

    All of it runs on the `device`, or where Accelerate would. Raises RecipeError if there is no such device.
    """
    console = stderr()

    def say(what: str) -> None:
        if not quiet and int(os.environ.get("RANK", "0")) == 0:
            console.print(f"· {what}", style="dim", soft_wrap=True)

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|accelerate|datasets")
    say("starting")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # it tells every retry; the sentence at the end says it all
    transformers.logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():  # in a log they are only noise
        transformers.logging.disable_progress_bar()
    if device is not None:
        check_device(device)
        os.environ["ACCELERATE_TORCH_DEVICE"] = device  # what every Accelerator and Trainer asks
    os.environ |= {"DATASETS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # read when it is imported
    yield say


def check_device(device: str) -> None:
    """Raise RecipeError for a device that torch does not know, or that is not here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise RecipeError(
            f"The device {device!r} cannot be used here ({str(error).strip().splitlines()[0].rstrip('.')}); name cpu, "
            "cuda, cuda:1, mps or another that `hf-zipit doctor` shows."
        ) from error
