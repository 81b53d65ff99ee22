"""The command that says which experts to merge with which."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_zipit.cli.app import app
from hf_zipit.cli.options import (
    Classes,
    ColumnNames,
    Device,
    Json,
    Quiet,
    Streaming,
    number_or_name,
    parse_classes,
    parse_columns,
    parse_experts,
)
from hf_zipit.cli.printing import print_json, stdout, working
from hf_zipit.errors import RecipeError
from hf_zipit.extras import require
from hf_zipit.registry import suggestion


@app.command(
    "hf-zipit group clothes=me/vit-clothes shoes=me/vit-shoes hats=me/vit-hats -c me/pictures",
    "hf-zipit group out/a out/b out/c out/d -c out/pictures --groups 2 --plot groups.png",
    topic="exploring",
)
def group(
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERT...", help="Repo ids or folders, each as TASK=MODEL or as MODEL alone."),
    ],
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration", "-c", help="Unlabelled data: a name on the Hub, a folder, a file or sklearn-digits."
        ),
    ],
    groups: Annotated[int, typer.Option("--groups", "-g", help="How many models there are to be.", min=1)] = 2,
    split: Annotated[str, typer.Option(help="The split of the calibration data.")] = "train",
    samples: Annotated[
        int, typer.Option(help="How many calibration samples of each task; a quarter is held out.", min=2)
    ] = 512,
    column: ColumnNames = None,
    classes: Classes = None,
    streaming: Streaming = False,
    method: Annotated[
        str, typer.Option("--method", "-m", help="How units are matched; auto is the best known.")
    ] = "auto",
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit", help="Whether merges are refitted, which takes longer.", show_default=False
        ),
    ] = None,
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Share of blocks to merge, from 0 to 1 (all), or a block's path.")
    ] = "1.0",
    plot: Annotated[
        Path | None, typer.Option(help="Draw what tasks lose with each other into this file: .png, .svg or .pdf.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random draws.", min=0)] = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which experts to merge with which.

    Merges every two of them, measures on held-out samples what each loses with the other, and divides them into the
    groups that lose least. Saves no model.
    """
    with working(quiet, device) as say:
        from hf_zipit.files import check_writable
        from hf_zipit.recipe.loading import check_recipe
        from hf_zipit.recipe.sections import REFIT, CalibrationData, ExpertEntry, Recipe
        from hf_zipit.report.grouping import disturbance, grouping_table
        from hf_zipit.report.plots import picture_kind, save_picture
        from hf_zipit.running.exploring import group_recipe

        say("checking")
        if plot is not None:
            require("matplotlib")
            picture_kind(plot)
            check_writable(plot.parent)
        named, own = parse_experts(experts), parse_classes(classes)
        if unknown := next((task for task in own if task not in named), None):
            raise RecipeError(f"--classes names the task {unknown!r}; {suggestion(unknown, named)}")
        recipe = Recipe(
            name="group",
            experts={task: ExpertEntry(model=source, classes=own.get(task, ())) for task, source in named.items()},
            calibration=CalibrationData(
                calibration, split, columns=parse_columns(column), streaming=streaming, samples=samples
            ),
            method=(f"{method}{REFIT}" if refit and not method.endswith(REFIT) else method,),
            depth=(number_or_name(depth),),
            seed=seed,
            refit=False if refit is False else None,
        )
        check_recipe(recipe)
        found = group_recipe(recipe, groups, say=say)
        if plot is not None:
            save_picture(disturbance(found), plot)
    if as_json:
        print_json(found.to_dict())
        return
    stdout().print(grouping_table(found))
