"""Commands that work on models: merge, inspect, evaluate, compare, verify, push, card, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_zipit.cli.app import app
from hf_zipit.cli.options import (
    CalibrationSplit,
    Classes,
    Co2,
    ColumnNames,
    Depth,
    Device,
    DryRun,
    Experts,
    Json,
    Quiet,
    Seed,
    Streaming,
    expert_entries,
    number_or_name,
    parse_classes,
    parse_columns,
    refitted,
)  # fmt: skip
from hf_zipit.cli.printing import (
    print_json,
    print_lines,
    print_plans,
    print_result,
    print_unknown_ops,
    stdout,
    working,
)
from hf_zipit.errors import RecipeError


@app.command(
    "hf-zipit merge clothes=me/vit-clothes shoes=me/vit-shoes -c me/pictures -o out/merged --refit",
    "hf-zipit merge low=out/quickstart/experts/low high=out/quickstart/experts/high -c sklearn-digits -o out/digits",
    "hf-zipit merge clothes=me/vit-clothes shoes=me/vit-shoes --base me/vit -m identity --combine ties -o out/ties",
)
def merge(
    experts: Experts,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", "-c", help="Unlabelled data: a name on the Hub, a folder, a file or sklearn-digits."
        ),
    ] = None,
    split: CalibrationSplit = "train",
    samples: Annotated[int, typer.Option(help="Calibration samples per task.", min=1)] = 512,
    column: ColumnNames = None,
    classes: Classes = None,
    streaming: Streaming = False,
    method: Annotated[
        str, typer.Option("--method", "-m", help="How units are matched: auto (the best known), zip, permute, ...")
    ] = "auto",
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="Regress merged modules on what the experts compute; auto does where there is data.",
            show_default=False,
        ),
    ] = None,
    combine: Annotated[
        str,
        typer.Option("--combine", help="How matched weights become one: average, ties, task-arithmetic, ..."),
    ] = "average",
    base: Annotated[
        str | None,
        typer.Option(help="The model that all experts started from, for rules that read it.", show_default=False),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Train the other experts from this one's weights before they are merged.",
            show_default=False,
        ),
    ] = None,
    polish: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Train at the end: weights, all on what the experts compute, or fewer: adamerging, surgery, ...",
            show_default=False,
        ),
    ] = None,
    residues: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|KIND",
            help="Keep some of what merging takes from each task: a size, such as 1.1, or a kind: t-switch, emr, ...",
        ),
    ] = None,
    depth: Depth = "1.0",
    size: Annotated[
        float | None,
        typer.Option(
            help="Instead of a depth: at most this many times the parameters of one expert, 1.25 for instance.",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[
        Literal["same", "union"],
        typer.Option(help="For tokenizers that differ: union matches tokens by their text."),
    ] = "same",
    seed: Seed = 0,
    co2: Co2 = None,
    device: Device = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge two or more experts into one model.

    It is saved with its card and with the recipe that makes it again; `run` does the same for a recipe of your own.
    At the end it says how often the result answers as its experts do, on samples that the merge has not read.
    """
    with working(quiet, device) as say:
        from hf_zipit.recipe.loading import check_recipe
        from hf_zipit.recipe.sections import CalibrationData, Recipe
        from hf_zipit.running.run import run_recipe

        say("checking")
        entries = expert_entries(experts, classes)
        columns = parse_columns(column)
        data = None
        if calibration:
            data = CalibrationData(calibration, split, columns=columns, streaming=streaming, samples=samples)
        settings = {
            **({"combine": combine} if combine != "average" else {}),
            **({"root": root} if root else {}),
            **({"polish": polish} if polish else {}),
            **({"residues": number_or_name(residues)} if residues else {}),
            **({} if size is None else {"size": size}),
            **({"vocabulary": "union"} if vocabulary == "union" else {}),
        }
        recipe = Recipe(
            name=out.absolute().name, experts=entries, base=base, calibration=data, depth=(number_or_name(depth),),
            output=out, seed=seed, settings=settings, **refitted(method, refit),
        )  # fmt: skip
        check_recipe(recipe, [out])
        if dry_run:
            print_plans(recipe, as_json, say)
            return
        result = run_recipe(recipe, save="model", say=say, co2=co2)
    print_result(result, as_json)


@app.command(
    "hf-zipit inspect google/vit-base-patch16-224",
    "hf-zipit inspect out/merged",
    "hf-zipit inspect out/merged --task shoes",
    topic="looking",
)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A repo id or folder.")],
    task: Annotated[
        str | None, typer.Option("--task", help="Of a merged model this task, as the plain model that it can become.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random transformation in the proof.", min=0)] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which units of a model may move, and prove it.

    Prints every set of units that may be reordered or rotated without changing what the model computes, and the error
    of the outputs after a random such change. Of a merged model it shows the tasks, what they share and how it was
    made.
    """
    with working(quiet) as say:
        from hf_zipit.experts.loading import load_expert
        from hf_zipit.modeling import ZipItPreTrainedModel
        from hf_zipit.report.costs import model_costs, model_costs_line
        from hf_zipit.report.merged import merged_parts
        from hf_zipit.symmetry import MergeSpec, prove
        from hf_zipit.symmetry.proof import TOLERANCE
        from hf_zipit.symmetry.summary import space_rows

        say(f"loading {model}")
        loaded = load_expert(model, model)
        parts = None
        if isinstance(loaded, ZipItPreTrainedModel):
            parts = merged_parts(loaded) if task is None else None
            loaded = loaded if task is None else loaded.expert(task)
        elif task is not None:
            raise RecipeError(f"--task names {task!r}, but {model} is not a merged model; leave it out.")
        if parts is None:
            say("tracing")
            spec = MergeSpec.from_model(loaded)
            say("proving")
            error = prove(loaded, spec, seed=seed)
            rows = space_rows(spec, loaded)
            costs = model_costs(loaded)
    if parts is not None:
        from hf_zipit.report.merged import parts_table

        print_json(parts.to_dict()) if as_json else stdout().print(parts_table(parts, title=model))
        if not as_json:
            print_lines(parts.lines())
        return
    if as_json:
        print_json(
            {
                "architecture": spec.architecture,
                "spaces": rows,
                "unknown_ops": {op: list(modules) for op, modules in spec.unknown_ops.items()},
                "proof": {"error": error, "tolerance": TOLERANCE, "holds": error <= TOLERANCE},
                "costs": costs,
            }
        )
        return
    from hf_zipit.report.tables import spaces_table

    console = stdout()
    console.print(spaces_table(rows, title=f"{spec.architecture}: {len(rows)} spaces"))
    print_unknown_ops(spec.unknown_ops)
    verdict = "proven" if error <= TOLERANCE else "NOT PROVEN"
    console.print(f"{verdict}: relative error of the outputs {error:.1e}, at most {TOLERANCE:.0e} is allowed")
    console.print(model_costs_line(costs), soft_wrap=True)


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
    column: ColumnNames = None,
    classes: Classes = None,
    samples: Annotated[int | None, typer.Option(help="At most this many samples of each task.", min=1)] = None,
    streaming: Streaming = False,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a merged model on a data set.

    Prints the accuracy per task and jointly, and the metrics that are named. Classes are matched by their names.
    Models without classes, such as CLIP, have no accuracy and need a metric.
    """
    with working(quiet, device) as say:
        from hf_zipit.evaluation.measure import evaluate as measured
        from hf_zipit.recipe.sections import Data
        from hf_zipit.recipe.sources import check_source
        from hf_zipit.running.data import merged_task_data
        from hf_zipit.running.saved import load_merged

        if streaming and samples is None:
            raise RecipeError("--streaming reads only what is asked for; say how many samples with --samples.")
        check_source(dataset)
        source = Data(dataset, split, columns=parse_columns(column), streaming=streaming, samples=samples)
        say(f"loading {model}")
        merged = load_merged(model)
        data = merged_task_data(merged, model, source, task, parse_classes(classes), say)
        say("measuring")
        found = measured(merged, data, metrics=metric or (), batch_size=batch_size)
    if as_json:
        plain = found.to_dict()
        scores = {name: plain[name] for name in ("scores", "score_intervals")}
        print_json({**(found.model.to_dict() if found.model else {}), **scores})
        return
    from hf_zipit.report.tables import accuracy_table, scores_table

    console = stdout()
    if found.model:
        console.print(accuracy_table({model: found.model}, title=f"accuracy on {dataset}, split {split}"))
    if found.scores:
        console.print(scores_table({model: found.scores}, title=f"metrics on {dataset}, split {split}"))


@app.command("hf-zipit compare out/merged me/other-merge --dataset me/pictures")
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A merged model: a repo id or a folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same tasks.")],
    dataset: Annotated[
        str, typer.Option("--dataset", help="A data set: a name on the Hub, a folder or sklearn-digits.")
    ],
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    column: ColumnNames = None,
    classes: Classes = None,
    samples: Annotated[int | None, typer.Option(help="At most this many samples of each task.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which of two merged models is better, with intervals.

    Both are measured on the same samples: the difference has its own interval, narrower than those of the two.
    """
    with working(quiet, device) as say:
        from hf_zipit.evaluation.measure import evaluate as measured
        from hf_zipit.recipe.sections import Data
        from hf_zipit.recipe.sources import check_source
        from hf_zipit.running.data import merged_task_data
        from hf_zipit.running.saved import load_merged

        check_source(dataset)
        source = Data(dataset, split, columns=parse_columns(column), samples=samples)
        models = {name: load_merged(name) for name in (first, second)}
        tasks = [task for task in models[first].config.tasks if task in models[second].config.tasks]
        if not tasks:
            raise RecipeError(f"{first} and {second} have no task in common; compare models of the same tasks.")
        found = {}
        for name, model in models.items():
            say(f"measuring {name}")
            data = merged_task_data(model, name, source, tasks, parse_classes(classes), say)
            found[name] = measured(model, data, batch_size=batch_size)
        comparison = found[first].compared(found[second])
    if as_json:
        accuracies = {name: each.model.to_dict() for name, each in found.items()}
        print_json({"models": accuracies, "comparison": comparison.to_dict()})
        return
    from hf_zipit.report.tables import accuracy_table, comparison_table

    console = stdout()
    console.print(accuracy_table({name: each.model for name, each in found.items()}, title=f"accuracy on {dataset}"))
    console.print(comparison_table(comparison, ("A", "B"), title=f"A: {first}, B: {second}"))


@app.command(
    "hf-zipit verify me/merged",
    "hf-zipit verify me/merged --dataset me/pictures --split test",
    topic="looking",
)
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A merged model: a repo id or a folder.")],
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Measure its scores again on this: a name on the Hub, a folder or a file."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    column: ColumnNames = None,
    classes: Classes = None,
    samples: Annotated[int | None, typer.Option(help="At most this many samples of each task.", min=1)] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Read the calibration data that the recipe names again, too.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check again what a merged model claims.

    Its weights and its experts must have the digests that it records, its recipe and licence must be those that follow
    from them, and with --dataset its scores must come out again. Ends with 1 if a claim does not hold.
    """
    with working(quiet, device) as say:
        from hf_zipit.recipe.sections import Data
        from hf_zipit.report.doctor import checks_table
        from hf_zipit.running.verify import verify as verified

        data = Data(dataset, split, columns=parse_columns(column), samples=samples) if dataset else None
        checks = verified(model, data, parse_classes(classes), say, calibration=calibration)
    if as_json:
        print_json([check.to_dict() for check in checks])
    else:
        stdout().print(checks_table(checks))
    if any(not check.good for check in checks):
        sys.exit(1)


@app.command("hf-zipit push out/merged me/vit-clothes-shoes --private", topic="publishing")
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
    with working(quiet) as say:
        from hf_zipit.running.saved import push_saved

        say(f"pushing to {repo_id}")
        pushed = push_saved(
            source, repo_id, private=private, revision=revision, create_pr=create_pr, commit_message=message
        )
    if as_json:
        print_json({"url": str(pushed.repo_url), "commit": pushed.oid, "pull_request": pushed.pr_url})
    else:
        print(pushed.pr_url or pushed.repo_url)


@app.command("hf-zipit card out/merged", topic="publishing")
def card(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A merged model: repo id or folder.")],
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Write it with its pictures into the model's folder.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a merged model's card, or write it again."""
    with working(quiet) as say:
        from hf_zipit.running.saved import card_of

        say(f"loading {model}")
        text, path = card_of(model, write=write)
    if as_json:
        print_json({"card": text, "path": str(path) if path else None})
    else:
        print(path or text)


@app.command("hf-zipit app", "hf-zipit app --port 8000", name="app")
def page(
    port: Annotated[
        int | None, typer.Option(help="The port; the first free one from 7860 by default.", show_default=False)
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Make a public link through Gradio's servers.")] = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Open a page in the browser to try a merge.

    Two models, whether they fit, what a merge would cost, a merge on a few samples, and a download.
    """
    with working(quiet, device) as say:
        from hf_zipit.app import launch

        say("starting the page; Ctrl-C ends it")
        launch(port, share=share)


@app.command("hf-zipit doctor", topic="looking")
def doctor(as_json: Json = False) -> None:
    """Say what works here, and how to fix what does not.

    Reads the versions of packages, devices, processes and the connection to the Hub. Ends with 1 if something needs
    fixing.
    """
    from hf_zipit.report.doctor import checks_table, examine

    checks = examine()
    if as_json:
        print_json([check.to_dict() for check in checks])
    else:
        stdout().print(checks_table(checks))
    if any(not check.good for check in checks):
        sys.exit(1)
