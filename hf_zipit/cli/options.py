"""What the arguments of several commands mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_zipit.errors import RecipeError
from hf_zipit.recipe.sections import Recipe

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

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


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


def parse_depth(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def read_recipe(path: Path, out: Path | None, say: Any) -> Recipe:
    from dataclasses import replace

    say("checking the recipe")
    from hf_zipit.recipe.loading import check_recipe, load_recipe

    loaded = load_recipe(path)
    if out is not None:
        loaded = replace(loaded, output=out)
        check_recipe(loaded)
    return loaded
