"""The command that says which experts to merge with which."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_zipit.cli.app import app
from hf_zipit.cli.options import (
    CalibrationSplit,
    Classes,
    ColumnNames,
    Depth,
    Device,
    Experts,
    Json,
    Quiet,
    Seed,
    Streaming,
    check_picture,
    expert_entries,
    number_or_name,
    parse_columns,
    refitted,
)
from hf_zipit.cli.printing import print_json, stdout, working


@app.command(
    "hf-zipit group clothes=me/vit-clothes shoes=me/vit-shoes hats=me/vit-hats -c me/pictures",
    "hf-zipit group out/a out/b out/c out/d -c out/pictures --groups 2 --plot groups.png",
    topic="exploring",
)
def group(
    experts: Experts,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration", "-c", help="Unlabelled data: a name on the Hub, a folder, a file or sklearn-digits."
        ),
    ],
    groups: Annotated[int, typer.Option("--groups", "-g", help="How many models there are to be.", min=1)] = 2,
    split: CalibrationSplit = "train",
    samples: Annotated[int, typer.Option(help="Calibration samples per task; a quarter is held out.", min=2)] = 512,
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
    depth: Depth = "1.0",
    plot: Annotated[
        Path | None, typer.Option(help="Draw what tasks lose with each other into this file: .png, .svg or .pdf.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which experts to merge with which.

    Merges every two of them, measures on held-out samples what each loses with the other, and divides them into the
    groups that lose least. Saves no model.
    """
    with working(quiet, device) as say:
        from hf_zipit.recipe.loading import check_recipe
        from hf_zipit.recipe.sections import CalibrationData, Recipe
        from hf_zipit.report.grouping import disturbance, grouping_table
        from hf_zipit.report.plots import save_picture
        from hf_zipit.running.exploring import group_recipe

        say("checking")
        if plot is not None:
            check_picture(plot)
        recipe = Recipe(
            name="group",
            experts=expert_entries(experts, classes),
            calibration=CalibrationData(
                calibration, split, columns=parse_columns(column), streaming=streaming, samples=samples
            ),
            depth=(number_or_name(depth),),
            seed=seed,
            **refitted(method, refit),
        )
        check_recipe(recipe)
        found = group_recipe(recipe, groups, say=say)
        if plot is not None:
            save_picture(disturbance(found), plot)
    if as_json:
        print_json(found.to_dict())
        return
    stdout().print(grouping_table(found))
