"""The command that merges LoRA adapters in their factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_zipit.cli.app import app
from hf_zipit.cli.options import (
    CalibrationSplit,
    ColumnNames,
    Device,
    Json,
    Quiet,
    Seed,
    parse_columns,
    parse_experts,
    parse_options,
)
from hf_zipit.cli.printing import print_json, print_lines, working


@app.command(
    "hf-zipit merge-adapters mood=me/lora-mood topic=me/lora-topic -o out/lora",
    "hf-zipit merge-adapters me/lora-mood me/lora-topic -o out/lora --rule core-space --option combine=ties",
    name="merge-adapters",
)
def merge_adapters(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Repo ids or folders, each as TASK=ADAPTER or as ADAPTER alone."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged adapter, or model.")],
    rule: Annotated[
        str, typer.Option("--rule", help="How factors are merged: linear, core-space, knots, ssr.")
    ] = "linear",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="An option of the rule, as NAME=VALUE, VALUE in JSON or a word; may be repeated."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="The most that the merged rank may be.", min=1, show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that all of them adapt, in place of the one that they name.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Save full weights: the base with the merged adapter.")] = False,
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", help="Unlabelled data, for the rule ssr.")
    ] = None,
    split: CalibrationSplit = "train",
    samples: Annotated[int, typer.Option(help="Number of calibration samples.", min=1)] = 512,
    column: ColumnNames = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge LoRA adapters of one base in their factors.

    What comes out is an adapter that PEFT loads. Where tasks keep a classifier of their own there is one for each, in
    a folder of the task's name. Adapters of other kinds are merged by `merge`, as full models.
    """
    with working(quiet, device) as say:
        from hf_zipit.files import check_result_folder
        from hf_zipit.lora.merging import merge_adapters as merged_adapters

        named, options = parse_experts(adapters), parse_options(option)
        if full:
            check_result_folder(out, named.values())
        data: Any = None
        if calibration:
            from hf_zipit.recipe.sources import load_source

            say("reading the data")
            columns = parse_columns(column)
            found = load_source(calibration, split, columns=columns, labelled=None).shuffle(seed)
            data = found.select(range(min(samples, len(found))))
        say("merging")
        result = merged_adapters(
            named, data, rule=rule, options=options, rank=rank, base=base, seed=seed, output_dir=None if full else out
        )
        if full:
            say("adding the merged adapter to the base")
            result.model().save_pretrained(out)
    ranks = [update.rank for update in result.updates.values()]
    about = {"out": str(out), "tasks": list(result.tasks), "layers": len(ranks), "rank": max(ranks), "rule": rule}
    if as_json:
        print_json(about)
        return
    per_task = "an adapter for each task" if result.has_heads else "one adapter"
    what = "the full model" if full else per_task
    print_lines([f"{out}: {what}; {len(ranks)} layers of a rank up to {max(ranks)}, {rule} {json.dumps(options)}"])
