"""`python -m benchmarks.zoo --out DIR [--only PAIR]`: rebuild the zoo of expert pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.zoo.store import build
from benchmarks.zoo.table import RECIPES


def main(
    out: Annotated[Path, typer.Option(help="The folder of the zoo; experts that it holds are kept.")],
    only: Annotated[list[str] | None, typer.Option(help=f"A pair: {', '.join(RECIPES)}. May be repeated.")] = None,
    shift: Annotated[int, typer.Option(help="Add this to every seed; wants a folder of its own.")] = 0,
    reuse: Annotated[Path | None, typer.Option(help="Copy experts found in this folder instead of training.")] = None,
) -> None:
    """Train the zoo's expert pairs, or the named ones, into a folder."""
    try:
        build(only or RECIPES, out, reuse, say=typer.echo, shift=shift)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
