"""`python -m benchmarks.zoo.export --zoo DIR PAIR`: a pair's data as `datasets` folders, for recipes.

`DIR/PAIR/data/TASK` is a `DatasetDict` with the splits train, validation and test; its columns are ready for a model,
its labels carry the names of the task's classes. With the experts in `DIR/PAIR/TASK` that is all that a recipe needs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from datasets import ClassLabel, Dataset, DatasetDict

from benchmarks.zoo.pair import Pair
from benchmarks.zoo.store import load
from benchmarks.zoo.table import RECIPES


def export(pair: Pair, root: Path) -> Path:
    """Write the data of a pair into `ROOT/PAIR/data`, over what is there; returns that folder."""
    folder = root / pair.name / "data"
    for task, splits in pair.splits.items():
        found = {}
        for split, rows in splits.items():
            data = Dataset.from_dict({name: tensor.numpy() for name, tensor in rows.items()})
            if pair.metric.classes is not None and rows["labels"].ndim == 1:
                data = data.cast_column("labels", ClassLabel(names=list(pair.metric.classes[task])))
            found[split] = data
        partial = folder.with_name(f".data-{task}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        DatasetDict(found).save_to_disk(partial)
        shutil.rmtree(folder / task, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        partial.rename(folder / task)
    return folder


def main(
    pair: Annotated[str, typer.Argument(help=f"A pair: {', '.join(RECIPES)}.")],
    zoo: Annotated[Path, typer.Option(help="The folder of the zoo; experts that it lacks are trained.")],
) -> None:
    """Write a pair's data beside its experts, so that a recipe can name them."""
    try:
        typer.echo(export(load(pair, zoo), zoo))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
