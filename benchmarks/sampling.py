"""How well a page's scores are known: each pair's training seeds and the sampling error of its scores, into the page.

    python -m benchmarks.sampling docs/frontier.md --zoo zoo

Only the data are read, no model. The error is that of the test samples alone; what other experts would give is another
matter, for which `benchmarks.spread` trains them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.zoo.store import splits_of
from benchmarks.zoo.table import RECIPES
from hf_zipit.files import write_text

ROW = "permute + refit"
LEVEL, DEVIATIONS = 95, 1.96
BEGINS = "Training seeds: "


def half_width(scores: Sequence[float], counts: Sequence[int]) -> float:
    """Half the interval of the mean of shares `scores` of `counts` independent answers each."""
    return DEVIATIONS * sqrt(sum(p * (1 - p) / n for p, n in zip(scores, counts, strict=True))) / len(scores)


def told(pair: str, zoo: Path, scores: Sequence[float]) -> str:
    """The sentence of one pair, `scores` being the tasks' in their order."""
    recipe = RECIPES[pair]
    splits, metric = splits_of(recipe, zoo)
    labels = {task: splits[task]["test"]["labels"] for task in recipe.seeds}
    samples = [len(each) for each in labels.values()]
    answers = [metric.targets(each).numel() for each in labels.values()]
    seeds = ", ".join(f"{task} {seed}" for task, seed in recipe.seeds.items())
    alone = f"±{half_width(scores, answers):.3f}".replace("0.", ".", 1)
    alike = f"±{half_width(scores, samples):.3f}".replace("0.", ".", 1)
    counted = ", ".join(f"{n:,}" for n in dict.fromkeys(answers))
    within = f", {alike} if those of one sample were all alike" if answers != samples else ""
    return f"{BEGINS}{seeds}. Scored are {counted} answers a task: the mean of *{ROW}* is known to {alone}{within}."


def updated(page: str, zoo: Path) -> str:
    """The page with a sentence below every pair's first one."""
    head, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    found = []
    for section in sections:
        name, _, rest = section.partition("\n")
        if name in RECIPES and (row := re.search(rf"^\| {re.escape(ROW)} \|(.*)\|$", rest, re.MULTILINE)):
            cells = [cell.strip() for cell in row[1].split("|")]
            scores = [float(cell) for cell in cells[: len(RECIPES[name].seeds)]]
            about, *others = rest.strip("\n").split("\n\n")
            others = [other for other in others if not other.startswith(BEGINS)]
            rest = "\n" + "\n\n".join([about, told(name, zoo, scores), *others]) + "\n\n"
        found.append(f"## {name}\n{rest}")
    return "".join([head, *found]).rstrip("\n") + "\n"


def main(
    page: Annotated[Path, typer.Argument(help="The Markdown file.")],
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo, for its tokenizers.")],
) -> None:
    """Write seeds and sampling errors into a page."""
    write_text(page, updated(page.read_text(encoding="utf-8"), zoo))


if __name__ == "__main__":
    typer.run(main)
