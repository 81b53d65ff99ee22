"""What the arguments of several commands mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_zipit.config import REFIT
from hf_zipit.errors import RecipeError
from hf_zipit.extras import require
from hf_zipit.recipe.sections import ExpertEntry, Recipe
from hf_zipit.registry import suggestion

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file; see recipes/ for examples.")]

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the results, in place of the recipe's.", show_default=False),
]

ColumnNames = Annotated[
    list[str] | None,
    typer.Option("--column", help="A column's name in the data and its new one, as OLD=NEW; may be repeated."),
]

Json = Annotated[bool, typer.Option("--json", help="Short for --format json.")]

Device = Annotated[
    str | None,
    typer.Option("--device", help="Where to run: cpu, cuda, cuda:1, mps; a GPU by default.", show_default=False),
]

Co2 = Annotated[
    str | None,
    typer.Option(
        "--co2",
        metavar="COUNTRY",
        help="Put what the run emitted into the card (codecarbon); give the machine's country, such as FRA.",
        show_default=False,
    ),
]

Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--classes",
        help="The data's classes of a task in the order of its labels, as TASK=A,B,C; may be repeated.",
    ),
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


Streaming = Annotated[bool, typer.Option("--streaming", help="Read only these samples from the Hub.")]

Experts = Annotated[
    list[str],
    typer.Argument(metavar="EXPERT...", help="Repo ids or folders, each as TASK=MODEL or as MODEL alone."),
]

CalibrationSplit = Annotated[str, typer.Option("--split", help="The split of the calibration data.")]

Depth = Annotated[
    str, typer.Option("--depth", "-d", help="Share of blocks to merge, from 0 to 1 (all), or a block's path.")
]

Seed = Annotated[int, typer.Option("--seed", help="Seed of all random draws.", min=0)]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")]


def parse_experts(arguments: list[str]) -> dict[str, str]:
    """`TASK=MODEL` arguments by task; where the task is left out, it is the last part of the model's path.

    Raises RecipeError if a task is empty or named twice.
    """
    experts: dict[str, str] = {}
    for argument in arguments:
        named = argument if "=" in argument else f"{Path(argument.partition('@')[0]).name}={argument}"
        task, source = _pair(named, f"The expert {argument!r} should be TASK=MODEL, MODEL a repo id or folder.")
        if task in experts:
            raise RecipeError(f"Two experts are named {task!r}; give them task names: NAME={source}.")
        experts[task] = source
    return experts


def expert_entries(arguments: list[str], classes: list[str] | None) -> dict[str, ExpertEntry]:
    """A recipe's experts, of `TASK=MODEL` and `TASK=A,B,C` arguments; raises RecipeError as they are parsed, and for
    classes of no expert.
    """
    named, own = parse_experts(arguments), parse_classes(classes)
    if unknown := next((task for task in own if task not in named), None):
        raise RecipeError(f"--classes names the task {unknown!r}; {suggestion(unknown, named)}")
    return {task: ExpertEntry(model=source, classes=own.get(task, ())) for task, source in named.items()}


def refitted(method: str, refit: bool | None) -> dict[str, Any]:
    """A recipe's method and refit, of the options --method and --refit or --no-refit."""
    method = f"{method}{REFIT}" if refit and not method.endswith(REFIT) else method
    return {"method": (method,), "refit": False if refit is False else None}


def check_picture(path: Path) -> None:
    """Raises an error where a picture cannot be drawn into a file."""
    from hf_zipit.files import check_writable
    from hf_zipit.report.plots import picture_kind

    require("matplotlib")
    picture_kind(path)
    check_writable(path.parent)


def parse_columns(arguments: list[str] | None) -> dict[str, str]:
    """`OLD=NEW` arguments as a mapping; raises RecipeError for one that is none."""
    return dict(_pair(a, f"The column {a!r} should be OLD=NEW, as in img=image.") for a in arguments or ())


def parse_options(arguments: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` arguments as a mapping, values in JSON or else as they are; raises RecipeError for any other."""
    pairs = (_pair(a, f"The option {a!r} should be NAME=VALUE, as in combine=ties.") for a in arguments or ())
    found: dict[str, Any] = {}
    for name, value in pairs:
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def parse_classes(arguments: list[str] | None) -> dict[str, tuple[int | str, ...]]:
    """`TASK=A,B,C` arguments by task, numbers as numbers; raises RecipeError for one that is none."""
    pairs = (_pair(a, f"The classes {a!r} should be TASK=A,B,C, as in digits=0,1,2.") for a in arguments or ())
    return {
        task: tuple(int(name) if name.strip().isdecimal() else name.strip() for name in names.split(","))
        for task, names in pairs
    }


def _pair(argument: str, otherwise: str) -> tuple[str, str]:
    left, _, right = argument.partition("=")
    if not left.strip() or not right.strip():
        raise RecipeError(otherwise)
    return left, right


def number_or_name(value: str) -> float | str:
    """A number as such, a name as it is."""
    try:
        return float(value)
    except ValueError:
        return value


def read_recipe(path: Path, out: Path | None, say: Any) -> Recipe:
    """A checked recipe, with another output folder if one is given."""
    say("checking the recipe")
    from hf_zipit.recipe.loading import check_recipe, load_recipe

    recipe = load_recipe(path)
    if out is not None:
        recipe = replace(recipe, output=out)
        check_recipe(recipe)
    return recipe
