"""The command line: `hf-zipit run`, `merge`, `evaluate` and so on, or `hf zipit run` as an extension of `hf`.

Results go to stdout, progress to stderr. Bad input is told in one sentence and ends with exit code 1, a wrong use of
the command with 2; nobody should see a traceback for either. Importing the package takes some seconds, for it
registers the merged classes with transformers; what only some commands need is imported inside them.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hf_zipit.errors import RecipeError, ZipItError
from hf_zipit.house import Commands

if TYPE_CHECKING:
    from hf_zipit.recipe import Recipe
    from hf_zipit.running import RunResult

app = Commands(
    help="Merge Hugging Face models of different tasks and initialisations into one model, without training.",
    epilog="""First steps
  $ hf-zipit doctor
  $ hf-zipit run recipes/quickstart.yaml
  $ hf-zipit merge --help
""",
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file; see recipes/ for examples.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results.", show_default=False)]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="A column's name in the data and its new one, as OLD=NEW; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def main() -> None:
    """The console script. Of several processes the first one speaks."""
    try:
        with nullcontext() if int(os.environ.get("RANK", "0")) == 0 else silence():
            app("hf-zipit")
    except ZipItError as error:
        _stderr().print(Text(f"Error: {' '.join(str(error).split())}", style="red"), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _stderr().print("Stopped.", style="red")
        sys.exit(130)


@app.command(
    "hf-zipit run recipes/quickstart.yaml",
    "hf-zipit run recipe.yaml --dry-run   # check everything, print sizes and memory",
)
def run(
    recipe: RecipePath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: merge, measure, save.

    Every method is run at every depth; of the merged models the one under `save` is kept, with its card.
    """
    with _working(quiet) as say:
        loaded = _recipe(recipe, out, say)
        if dry_run:
            _print_plans(loaded, as_json, say)
            return
        from hf_zipit.running import run_recipe

        result = run_recipe(loaded, progress=_watched(quiet), say=say)
    _print_result(result, as_json)


@app.command("hf-zipit sweep recipes/quickstart.yaml -m permute -m zip+refit -d 1 -d 0.5 --plot depths.png")
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
    """Measure a recipe under several methods and depths.

    Saves no model; the table, and the picture if one is asked for, are all that comes out.
    """
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


@app.command("hf-zipit search recipes/quickstart.yaml --trials 20")
def search(
    recipe: RecipePath,
    sampler: Annotated[str | None, typer.Option(help="grid or tpe, instead of the recipe's.")] = None,
    trials: Annotated[int | None, typer.Option(help="At most so many merges.", min=1)] = None,
    max_size: Annotated[
        float | None, typer.Option(help="The best merge has at most so many times one expert's parameters.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the settings that merge best.

    They are judged on held-out calibration data, never on test data.

    Tries the space in the recipe's `search` section, or else every method at every depth of the recipe. Writes all
    trials, the picture of the frontier and the best recipe into OUT.
    """
    with _working(quiet) as say:
        from dataclasses import replace

        from hf_zipit.exploring import search_recipe
        from hf_zipit.files import check_writable
        from hf_zipit.recipe import Search

        loaded = _recipe(recipe, None, say)
        given = {"sampler": sampler, "trials": trials, "max_size": max_size}
        given = {name: value for name, value in given.items() if value is not None}
        loaded = replace(loaded, search=replace(loaded.search or Search(), **given))
        folder = check_writable(out or loaded.folder / "search")

        def watch(trial: Any) -> None:
            say(f"{trial.number + 1}: {trial.setting}: {trial.error or format(trial.score, '.3f')}")

        result = search_recipe(loaded, progress=_watched(quiet), say=say, watch=watch)
        if result.best_or_none is None:
            result.best  # noqa: B018 - raises the sentence that says why
        result.save(folder, recipe=loaded, title=loaded.name)
    if as_json:
        _print_json(result.to_dict())
        return
    from hf_zipit.report.frontier import search_notes, search_table

    console = _stdout()
    console.print(search_table(result, title=f"{loaded.name}: {len(result.trials)} merges"))
    for note in search_notes(result):
        console.print(note, soft_wrap=True)
    console.print(f"written  {folder}  (hf-zipit run {folder / 'best.yaml'})", soft_wrap=True)


@app.command("hf-zipit landscape recipes/quickstart.yaml -m permute -d 1")
def landscape(
    recipe: RecipePath,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="How units are matched; as the recipe's kept model by default."),
    ] = None,
    depth: Annotated[str | None, typer.Option("--depth", "-d", help="Share of blocks to merge, or a block.")] = None,
    grid: Annotated[int, typer.Option(help="Points on each axis of the plane; 0 for curves alone.", min=0)] = 13,
    steps: Annotated[int, typer.Option(help="Points on the line between the experts.", min=3)] = 11,
    samples: Annotated[int, typer.Option(help="Held-out samples of each task.", min=1)] = 128,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the loss around two experts and their merge.

    It is measured on held-out calibration data.

    Writes the contours in the plane through them, the curves on the line between them and all numbers into OUT.
    """
    with _working(quiet) as say:
        from hf_zipit.exploring import landscape_recipe
        from hf_zipit.files import check_writable

        loaded = _recipe(recipe, None, say)
        folder = check_writable(out or loaded.folder / "landscape")
        found = landscape_recipe(
            loaded, method=method, depth=_depth(depth) if depth else None, grid=grid, steps=steps, samples=samples,
            progress=_watched(quiet), say=say,
        )  # fmt: skip
        found.save(folder, title=loaded.name)
    if as_json:
        _print_json(found.to_dict())
        return
    from hf_zipit.report.landscape import barriers_table

    console = _stdout()
    console.print(barriers_table(found, title=f"{loaded.name}: {found.pair[0]} to {found.pair[1]}"))
    console.print(f"written  {folder}", soft_wrap=True)


@app.command(
    "hf-zipit merge clothes=me/vit-clothes shoes=me/vit-shoes -c me/pictures -o out/merged --refit",
    "hf-zipit merge low=out/quickstart/experts/low high=out/quickstart/experts/high -c sklearn-digits -o out/digits",
)
def merge(
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERT...", help="Repo ids or folders, each as TASK=MODEL or as MODEL alone."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", "-c", help="A data set: a name on the Hub, a folder or sklearn-digits."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split of the calibration data.")] = "train",
    samples: Annotated[int, typer.Option(help="How many calibration samples of each task.", min=1)] = 512,
    column: Columns = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read only these samples from the Hub.")] = False,
    method: Annotated[
        str, typer.Option("--method", "-m", help="How units are matched: zip, permute, weights, ...")
    ] = "zip",
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Regress merged modules on what the experts compute.")
    ] = False,
    depth: Annotated[str, typer.Option("--depth", "-d", help="Share of blocks to merge, or a block's path.")] = "1.0",
    seed: Annotated[int, typer.Option(help="Of all random draws.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge two or more experts into one model.

    It is saved with its card and with the recipe that makes it again; `run` does the same for a recipe of your own.
    """
    with _working(quiet) as say:
        from hf_zipit.files import check_result_folder
        from hf_zipit.recipe import REFIT, Calibration, ExpertEntry, Recipe, check_recipe
        from hf_zipit.running import run_recipe

        say("checking")
        entries = {task: ExpertEntry(model=source) for task, source in parse_experts(experts).items()}
        columns = parse_columns(column)
        data = None
        if calibration:
            data = Calibration(calibration, split, columns=columns, streaming=streaming, samples=samples)
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


@app.command("hf-zipit inspect google/vit-base-patch16-224")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A repo id or folder.")],
    seed: Annotated[int, typer.Option(help="Of the random transformation in the proof.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which units of a model may move, and prove it.

    Prints every set of units that may be reordered or rotated without changing what the model computes, and the error
    of the outputs after a random such change.
    """
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


@app.command(
    "hf-zipit evaluate out/quickstart/model --dataset sklearn-digits",
    "hf-zipit evaluate me/merged --dataset me/pictures --column img=image --metric f1",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A merged model: a repo id or a folder.")],
    dataset: Annotated[
        str, typer.Option("--dataset", help="A data set: a name on the Hub, a folder or sklearn-digits.")
    ],
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="f1, perplexity, retrieval_recall or accuracy; may be repeated."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be repeated. All of them by default.")
    ] = None,
    column: Columns = None,
    samples: Annotated[int | None, typer.Option(help="At most so many samples of each task.", min=1)] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read only these samples from the Hub.")] = False,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a merged model on a data set.

    Prints the accuracy per task and jointly, and the metrics that are named. Classes are matched by their names.
    Models without classes, such as CLIP, have no accuracy and need a metric.
    """
    with _working(quiet) as say:
        from hf_zipit.evaluation import evaluate as measured
        from hf_zipit.recipe import Data
        from hf_zipit.running import merged_task_data
        from hf_zipit.saved import load_merged
        from hf_zipit.sources import check_source

        if streaming and samples is None:
            raise RecipeError("--streaming reads only what is asked for; say how many samples with --samples.")
        check_source(dataset)
        source = Data(dataset, split, columns=parse_columns(column), streaming=streaming, samples=samples)
        say(f"loading {model}")
        merged = load_merged(model)
        data = merged_task_data(merged, model, source, task)
        say("measuring")
        found = measured(merged, data, metrics=metric or (), batch_size=batch_size)
    if as_json:
        _print_json({**(found.model.to_dict() if found.model else {}), "scores": found.to_dict()["scores"]})
        return
    from hf_zipit.report.tables import accuracy_table, scores_table

    console = _stdout()
    if found.model:
        console.print(accuracy_table({model: found.model}, title=f"accuracy on {dataset}, split {split}"))
    if found.scores:
        console.print(scores_table(found.scores, title=f"{model} on {dataset}, split {split}"))


@app.command("hf-zipit push out/merged me/vit-clothes-shoes --private")
def push(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|RECIPE", help="A merged model, or the recipe that made it.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to: user/name, or a name of your own.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who may see a new repo.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="The commit's first line.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push a merged model to the Hub, in one commit.

    Its card, its recipe and the processor of its experts go with it.
    """
    with _working(quiet) as say:
        from hf_zipit.saved import push_saved

        say(f"pushing to {repo_id}")
        pushed = push_saved(
            source, repo_id, private=private, revision=revision, create_pr=create_pr, commit_message=message
        )
    if as_json:
        _print_json({"url": str(pushed.repo_url), "commit": pushed.oid, "pull_request": pushed.pr_url})
    else:
        print(pushed.pr_url or pushed.repo_url)


@app.command("hf-zipit card out/merged")
def card(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A merged model: repo id or folder.")],
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Write it with its pictures into the model's folder.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a merged model's card, or write it anew."""
    with _working(quiet) as say:
        from hf_zipit.saved import card_of

        say(f"loading {model}")
        text, path = card_of(model, write=write)
    if as_json:
        _print_json({"card": text, "path": str(path) if path else None})
    else:
        print(path or text)


@app.command("hf-zipit doctor")
def doctor(as_json: Json = False) -> None:
    """Say what works here, and how to mend what does not.

    Looks at the versions of packages, devices, processes and the connection to the Hub. Ends with 1 if something needs
    mending.
    """
    from hf_zipit.report.doctor import examine

    checks = examine()
    if as_json:
        _print_json([check.to_dict() for check in checks])
    else:
        from hf_zipit.report.doctor import checks_table

        _stdout().print(checks_table(checks))
    if any(not check.good for check in checks):
        sys.exit(1)


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


def parse_columns(arguments: list[str] | None) -> dict[str, str]:
    """`OLD=NEW` arguments as a mapping; raises RecipeError for one that is none."""
    columns = {}
    for argument in arguments or ():
        old, named, new = argument.partition("=")
        if not (old.strip() and named and new.strip()):
            raise RecipeError(f"The column {argument!r} should be OLD=NEW, as in img=image.")
        columns[old] = new
    return columns


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
    if result.pushed:
        console.print(f"pushed   {result.pushed}", soft_wrap=True)


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
def silence() -> Iterator[None]:
    """Print nothing on stdout."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _working(quiet: bool) -> Iterator[Any]:
    """Gives a function that says on stderr what is being done, and keeps other libraries' chatter away."""
    import logging

    console = _stderr()

    def say(what: str) -> None:
        if not quiet and int(os.environ.get("RANK", "0")) == 0:
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
