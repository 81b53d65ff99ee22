"""The command line: `hf-zipit run | merge | inspect | sweep | evaluate | doctor`.

Results go to stdout, progress to stderr. Bad input is told in one sentence and ends with exit code 1, a wrong use of
the command with 2; nobody should see a traceback for either. What is slow to import (torch, transformers) is imported
inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hf_zipit.errors import RecipeError, ZipItError

if TYPE_CHECKING:
    from hf_zipit.recipe import Recipe
    from hf_zipit.running import RunResult

app = typer.Typer(
    name="hf-zipit",
    help="Merge Hugging Face models of different tasks and initialisations into one model, without training.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def main() -> None:
    """The console script."""
    try:
        app()
    except ZipItError as error:
        _stderr().print(Text(f"Error: {' '.join(str(error).split())}", style="red"), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _stderr().print("Stopped.", style="red")
        sys.exit(130)


@app.command()
def run(
    recipe: RecipePath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: merge, measure, save the model that the recipe keeps."""
    with _working(quiet) as say:
        loaded = _recipe(recipe, out, say)
        if dry_run:
            _print_plans(loaded, as_json, say)
            return
        from hf_zipit.running import run_recipe

        result = run_recipe(loaded, progress=_watched(quiet), say=say)
    _print_result(result, as_json)


@app.command()
def sweep(
    recipe: RecipePath,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Instead of the recipe's methods.")
    ] = None,
    depth: Annotated[list[str] | None, typer.Option("--depth", "-d", help="Instead of the recipe's depths.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy over depth into this PNG file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a recipe's experts under several methods and depths; saves no model."""
    with _working(quiet) as say:
        from dataclasses import replace

        from hf_zipit.recipe import REFIT, check_recipe
        from hf_zipit.running import run_recipe

        loaded = _recipe(recipe, None, say)
        if loaded.evaluation is None:
            raise RecipeError(f"The recipe {recipe} has no evaluation section; a sweep needs something to measure on.")
        methods = tuple(method) if method else loaded.method
        depths = tuple(_depth(value) for value in depth) if depth else loaded.depth
        options = {name: given for name, given in loaded.options.items() if name in methods}
        marked = [any(name.endswith(REFIT) for name in names) for names in (loaded.method, methods)]
        refit = None if marked == [True, False] else loaded.refit  # its settings were for methods that are left out
        loaded = replace(loaded, method=methods, depth=depths, options=options, refit=refit, save=None)
        check_recipe(loaded)
        result = run_recipe(loaded, save="nothing", progress=_watched(quiet), say=say)
        if plot is not None:
            from hf_zipit.files import replacing
            from hf_zipit.report.plots import accuracy_over_depth

            with replacing(plot) as beside:
                accuracy_over_depth(result.rows, result.experts, title=loaded.name).savefig(
                    beside, format="png", dpi=160
                )
    _print_result(result, as_json)


@app.command()
def merge(
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERT...", help="Repo ids or folders, each as TASK=MODEL or as MODEL alone."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", help="A data set: Hub name or folder.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of the calibration data.")] = "train",
    samples: Annotated[int, typer.Option(help="How many calibration samples of each task.", min=1)] = 512,
    method: Annotated[str, typer.Option("--method", "-m", help="How units are matched.")] = "zip",
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Regress merged modules on what the experts compute.")
    ] = False,
    depth: Annotated[str, typer.Option("--depth", "-d", help="Share of blocks to merge, or a block's path.")] = "1.0",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge two or more experts and save the model with its card."""
    with _working(quiet) as say:
        from hf_zipit.files import check_result_folder
        from hf_zipit.recipe import REFIT, Calibration, ExpertEntry, Recipe, check_recipe
        from hf_zipit.running import run_recipe

        say("checking")
        entries = {task: ExpertEntry(model=source) for task, source in parse_experts(experts).items()}
        data = Calibration(dataset=calibration, split=split, samples=samples) if calibration else None
        method = f"{method}{REFIT}" if refit and not method.endswith(REFIT) else method
        recipe = Recipe(
            name=out.absolute().name, experts=entries, calibration=data, method=(method,), depth=(_depth(depth),),
            output=out, seed=seed,
        )  # fmt: skip
        check_recipe(recipe)
        check_result_folder(out)
        if dry_run:
            _print_plans(recipe, as_json, say)
            return
        result = run_recipe(recipe, save="model", progress=_watched(quiet), say=say)
    _print_result(result, as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A repo id or folder.")],
    seed: Annotated[int, typer.Option(help="Of the random transformation in the proof.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print which units of a model may be reordered or rotated, and the error of the proof."""
    with _working(quiet) as say:
        from hf_zipit.experts import load_expert
        from hf_zipit.report.tables import space_rows
        from hf_zipit.symmetry import MergeSpec, prove
        from hf_zipit.symmetry.proof import TOLERANCE, model_tensors

        say(f"loading {model}")
        loaded = load_expert(model, model)
        say("tracing")
        spec = MergeSpec.from_model(loaded)
        say("proving")
        error = prove(loaded, spec, seed=seed)
        rows = space_rows(spec, {name: tensor.shape for name, tensor in model_tensors(loaded).items()})
    if as_json:
        _print_json(
            {
                "architecture": spec.architecture,
                "spaces": rows,
                "unknown_ops": {op: list(modules) for op, modules in spec.unknown_ops.items()},
                "proof": {"error": error, "tolerance": TOLERANCE, "holds": error <= TOLERANCE},
            }
        )
        return
    from hf_zipit.report.tables import spaces_table

    console = _stdout()
    console.print(spaces_table(rows, title=f"{spec.architecture}: {len(rows)} spaces"))
    for op, modules in spec.unknown_ops.items():
        console.print(f"No rule for {op} in {', '.join(modules) or 'the model itself'}: what it touches is fixed.")
    verdict = "proven" if error <= TOLERANCE else "NOT PROVEN"
    console.print(f"{verdict}: relative error of the outputs {error:.1e}, at most {TOLERANCE:.0e} is allowed")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A merged model: repo id or folder.")],
    dataset: Annotated[str, typer.Option("--dataset", help="A data set: Hub name or folder.")],
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the per-task and joint accuracy of a merged model; classes are matched by their names."""
    with _working(quiet) as say:
        from hf_zipit.evaluation import accuracy
        from hf_zipit.running import load_merged, merged_task_data

        say(f"loading {model}")
        merged = load_merged(model)
        data = merged_task_data(merged, model, dataset, split)
        say("measuring")
        found = accuracy(merged, data, batch_size=batch_size)
    if as_json:
        _print_json(found.to_dict())
        return
    from hf_zipit.report.tables import accuracy_table

    _stdout().print(accuracy_table({model: found}, title=f"accuracy on {dataset}, split {split}"))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works here: versions, devices, network settings; and what to do about what does not."""
    from hf_zipit.report.doctor import examine

    checks = examine()
    if as_json:
        _print_json([check.to_dict() for check in checks])
    else:
        from hf_zipit.report.doctor import checks_table

        _stdout().print(checks_table(checks))
    if any(not check.good for check in checks):
        raise typer.Exit(1)


def parse_experts(arguments: list[str]) -> dict[str, str]:
    """`TASK=MODEL` arguments by task; where the task is left out, it is the last part of the model's path.

    Raises:
        RecipeError: if a task is empty or named twice.
    """
    experts: dict[str, str] = {}
    for argument in arguments:
        task, named, source = argument.partition("=")
        if not named:
            task, source = Path(argument).name, argument
        if not task.strip() or not source.strip():
            raise RecipeError(f"The expert {argument!r} should be TASK=MODEL, with a repo id or folder as MODEL.")
        if task in experts:
            raise RecipeError(f"Two experts are named {task!r}; give them task names: NAME={source}.")
        experts[task] = source
    return experts


def _depth(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _recipe(path: Path, out: Path | None, say: Any) -> Recipe:
    from dataclasses import replace

    say("checking the recipe")
    from hf_zipit.recipe import check_recipe, load_recipe

    loaded = load_recipe(path)
    if out is not None:
        loaded = replace(loaded, output=out)
        check_recipe(loaded)
    return loaded


def _print_plans(recipe: Recipe, as_json: bool, say: Any) -> None:
    from hf_zipit.report.tables import plans_table
    from hf_zipit.running import plan_recipe

    plans = plan_recipe(recipe, say)
    if as_json:
        _print_json([{"method": method, **plan.to_dict()} for (method, _), plan in plans.items()])
        return
    first = next(iter(plans.values()))
    console = _stdout()
    console.print(plans_table(plans, title=f"{recipe.name}: {first.architecture}, tasks {', '.join(first.tasks)}"))
    if recipe.calibration and any(plan.passes for plan in plans.values()):
        number = recipe.calibration.samples
        console.print(
            f"Observes {f'at most {number:,}' if number else 'all'} samples of each task, once for all merges."
        )
    for op, modules in first.spec.unknown_ops.items():
        console.print(f"No rule for {op} in {', '.join(modules) or 'the model itself'}: what it touches is fixed.")


def _print_result(result: RunResult, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_dict())
        return
    from hf_zipit.report.tables import results_table

    console = _stdout()
    console.print(results_table(result.rows, result.experts, result.expert_parameters, title=result.recipe.name))
    if result.kept and result.model:
        console.print(f"model    {result.model}  ({result.kept.method}, depth {result.kept.depth:g})", soft_wrap=True)
    if result.refit:
        module, error = result.refit.worst(1)[0]
        console.print(
            f"refit    relative error {result.refit.mean:.3f} in the mean, most in {module} ({error:.3f})",
            soft_wrap=True,
        )
    if result.plot:
        console.print(f"picture  {result.plot}", soft_wrap=True)


def _watched(quiet: bool) -> bool:
    """Whether to draw progress bars: in a log they are only noise."""
    return not quiet and sys.stderr.isatty()


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _stdout() -> Console:
    """Tables as wide as the terminal; where there is none, wide enough to be read whole."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


@contextmanager
def _working(quiet: bool) -> Iterator[Any]:
    """Gives a function that says on stderr what is being done, and keeps other libraries' chatter away."""
    import logging

    console = _stderr()

    def say(what: str) -> None:
        if not quiet:
            console.print(f"· {what}", style="dim", soft_wrap=True)

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|accelerate|datasets")
    say("starting")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    yield say


if __name__ == "__main__":
    main()
