"""Commands that work on a recipe: run, sweep, search, landscape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_zipit.cli.app import app
from hf_zipit.cli.options import (
    Co2,
    Device,
    DryRun,
    Json,
    Out,
    Quiet,
    RecipePath,
    check_picture,
    number_or_name,
    read_recipe,
)
from hf_zipit.cli.printing import print_json, print_plans, print_result, stdout, working
from hf_zipit.errors import RecipeError


@app.command(
    "hf-zipit run recipes/quickstart.yaml",
    "hf-zipit run recipe.yaml --dry-run   # check it, print sizes and memory",
)
def run(
    recipe: RecipePath,
    dry_run: DryRun = False,
    out: Out = None,
    co2: Co2 = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: merge, measure, save.

    Every method is run at every depth; of the merged models the one under `save` is kept, with its card.
    """
    with working(quiet, device) as say:
        loaded = read_recipe(recipe, out, say)
        if dry_run:
            print_plans(loaded, as_json, say)
            return
        from hf_zipit.running.run import run_recipe

        result = run_recipe(loaded, say=say, co2=co2)
    print_result(result, as_json)


@app.command(
    "hf-zipit sweep recipes/quickstart.yaml -m permute -m zip+refit -d 1 -d 0.5 --plot depths.png", topic="exploring"
)
def sweep(
    recipe: RecipePath,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Instead of the recipe's methods; may be repeated.")
    ] = None,
    depth: Annotated[
        list[str] | None, typer.Option("--depth", "-d", help="Instead of the recipe's depths; may be repeated.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw accuracy over depth into this file: .png, .svg or .pdf.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a recipe under several methods and depths.

    Saves no model; the table, and the picture if one is asked for, are all that comes out.
    """
    with working(quiet, device) as say:
        from hf_zipit.recipe.loading import check_recipe
        from hf_zipit.recipe.sections import REFIT
        from hf_zipit.running.run import run_recipe

        if plot is not None:
            check_picture(plot)
        loaded = read_recipe(recipe, None, say)
        if loaded.evaluation is None:
            raise RecipeError(f"The recipe {recipe} has no evaluation section; a sweep needs something to measure on.")
        methods = tuple(method) if method else loaded.method
        depths = tuple(number_or_name(value) for value in depth) if depth else loaded.depth
        options = {name: given for name, given in loaded.options.items() if name in methods}
        marked = [any(name.endswith(REFIT) for name in names) for names in (loaded.method, methods)]
        refit = None if marked == [True, False] else loaded.refit  # its settings were for methods that are left out
        loaded = replace(loaded, method=methods, depth=depths, options=options, refit=refit, save=None)
        check_recipe(loaded)
        result = run_recipe(loaded, save="nothing", say=say)
        if plot is not None and result.experts is None:
            say(f"these models have no classes, so there is no accuracy to draw into {plot}")
        elif plot is not None:
            from hf_zipit.report.plots import accuracy_over_depth, save_picture

            picture = accuracy_over_depth(result.rows, result.experts, title=loaded.name)
            result = replace(result, plot=save_picture(picture, plot))
    print_result(result, as_json)


@app.command("hf-zipit search recipes/quickstart.yaml --trials 20", topic="exploring")
def search(
    recipe: RecipePath,
    sampler: Annotated[str | None, typer.Option(help="grid or tpe, instead of the recipe's.")] = None,
    trials: Annotated[int | None, typer.Option(help="At most this many merges.", min=1)] = None,
    max_size: Annotated[
        float | None, typer.Option(help="The best merge has at most this multiple of one expert's parameters.")
    ] = None,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the settings that merge best.

    They are judged on held-out calibration data, never on test data.

    Tries the space in the recipe's `search` section, or else every method at every depth of the recipe. Writes all
    trials, the picture of the frontier and the best recipe into the folder `--out`; without it, into `search` in the
    recipe's output folder.
    """
    with working(quiet, device) as say:
        from hf_zipit.files import check_writable
        from hf_zipit.recipe.sections import Search
        from hf_zipit.report.frontier import save_search, search_notes, search_table
        from hf_zipit.running.exploring import search_recipe

        loaded = read_recipe(recipe, None, say)
        given = {"sampler": sampler, "trials": trials, "max_size": max_size}
        given = {name: value for name, value in given.items() if value is not None}
        loaded = replace(loaded, search=replace(loaded.search or Search(), **given))
        folder = check_writable(out or loaded.folder / "search")

        def watch(trial: Any) -> None:
            say(f"{trial.number + 1}: {trial.setting}: {trial.error or format(trial.score, '.3f')}")

        result = search_recipe(loaded, say=say, watch=watch)
        result.best  # noqa: B018 - raises the sentence that says why there is none
        save_search(result, folder, recipe=loaded, title=loaded.name)
    if as_json:
        print_json(result.to_dict())
        return
    console = stdout()
    console.print(search_table(result, title=f"{loaded.name}: {len(result.trials)} merges"))
    for note in search_notes(result):
        console.print(note, soft_wrap=True)
    console.print(f"written  {folder}  (hf-zipit run {folder / 'best.yaml'})", soft_wrap=True)


@app.command("hf-zipit landscape recipes/quickstart.yaml -m permute -d 1", topic="exploring")
def landscape(
    recipe: RecipePath,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="How units are matched; as the recipe's kept model by default."),
    ] = None,
    depth: Annotated[
        str | None, typer.Option("--depth", "-d", help="Share of blocks to merge, from 0 to 1, or a block's path.")
    ] = None,
    grid: Annotated[int, typer.Option(help="Points on each axis of the plane; 0 for curves alone.", min=0)] = 13,
    steps: Annotated[int, typer.Option(help="Points on the line between the experts.", min=3)] = 11,
    samples: Annotated[int, typer.Option(help="Held-out samples of each task.", min=1)] = 128,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the loss around two experts and their merge.

    It is measured on held-out calibration data.

    Writes the contours in the plane through them, the curves on the line between them and all numbers into the folder
    `--out`; without it, into `landscape` in the recipe's output folder.
    """
    with working(quiet, device) as say:
        from hf_zipit.files import check_writable
        from hf_zipit.report.landscape import barriers_table, save_landscape
        from hf_zipit.running.exploring import landscape_recipe

        loaded = read_recipe(recipe, None, say)
        folder = check_writable(out or loaded.folder / "landscape")
        found = landscape_recipe(
            loaded, method=method, depth=number_or_name(depth) if depth else None, grid=grid, steps=steps,
            samples=samples, say=say,
        )  # fmt: skip
        save_landscape(found, folder, title=loaded.name)
    if as_json:
        print_json(found.to_dict())
        return
    console = stdout()
    console.print(barriers_table(found, title=f"{loaded.name}: {found.pair[0]} to {found.pair[1]}"))
    console.print(f"written  {folder}", soft_wrap=True)
