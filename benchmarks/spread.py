"""How much what a merge keeps varies: pairs of the zoo whose experts are trained from several pairs of seeds.

    python -m benchmarks.spread --zoo zoo --out docs/spread.md

The first pair of seeds is the zoo's own, the others are those shifted by 1000, 2000, ..., in `ZOO/shift-1000` and so
on; experts that are missing are trained (minutes each). Every row is measured in a process of its own.
`--json` keeps the rows and takes those that it has; `--measured` writes the page from what there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.measure import EXPERTS, SEED, Row, measure_apart
from benchmarks.results import SAMPLES, checked
from benchmarks.zoo import RECIPES, build
from hf_zipit import __version__
from hf_zipit.files import check_writable, write_json, write_text
from hf_zipit.report.tables import share

PAIRS = {
    "fashion-vit": 1,
    "fashion-resnet": 3,
    "segmentation": 3,
    "seq2seq-t5": 3,
    "text-llama": 1,
    "chars-mixed": 1,
}
"""How many pairs of seeds each is trained from: as many as an afternoon of one core allows."""

STEP = 1000
DEFAULT = "permute + refit"
METHODS = (EXPERTS, "average", "permute", DEFAULT)

Seeded = dict[str, dict[int, dict[str, Row]]]
"""Rows by pair, shift of the seeds and method."""


def asked() -> Iterator[tuple[str, int, str]]:
    """Pair, shift and method of every row."""
    for pair, seeds in PAIRS.items():
        for place in range(seeds):
            yield from ((pair, place * STEP, method) for method in METHODS)


def place_of(entry: dict) -> tuple[str, int, str]:
    """Pair, shift and method of a row that was kept."""
    return entry["row"]["pair"], entry["shift"], entry["row"]["method"]


def told(values: Iterable[str]) -> str:
    """The median, with the lowest and the highest in brackets where there are several values."""
    texts = sorted(values, key=lambda text: float(text.split()[0]))
    if len(texts) == 1:
        return texts[0]
    (low, *_), (number, *unit), (high, *_) = (text.split() for text in (texts[0], texts[len(texts) // 2], texts[-1]))
    middle = f"{median(float(text.split()[0]) for text in texts):.{len(number.partition('.')[2])}f}"
    return f"{' '.join([middle if number[0] != '.' else middle.removeprefix('0'), *unit])} ({low} to {high})"


def line(pair: str, by_shift: dict[int, dict[str, Row]]) -> list[str]:
    """A pair's row of the table."""
    found = list(by_shift.values())
    kept = {m: told(f"{100 * rows[m].mean / rows[EXPERTS].mean:.1f} %" for rows in found) for m in METHODS[1:]}
    experts = told(share(rows[EXPERTS].mean) for rows in found)
    cost = told(f"{rows[DEFAULT].cpu_seconds:.0f}" for rows in found)
    return [re.sub(r" \([^)]*\)", "", RECIPES[pair].about), str(len(found)), experts, *kept.values(), cost]


def document(rows: Seeded) -> str:
    """The page in Markdown."""
    each = [row for by_shift in rows.values() for found in by_shift.values() for row in found.values()]
    machines = "; or ".join(dict.fromkeys(row.machine for row in each))
    versions = ", ".join(f"`{digest}`" for digest in dict.fromkeys(row.sources for row in each))
    heads = ["pair", "pairs of seeds", "experts", *(f"{m}, of experts" for m in METHODS[1:]), "CPU s"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *(line(pair, found) for pair, found in rows.items())]
    seeds = "; ".join(
        f"{pair} {', '.join('/'.join(str(seed + shift) for seed in RECIPES[pair].seeds.values()) for shift in found)}"
        for pair, found in rows.items()
    )
    parts = [text for pair, found in rows.items() if len(found) > 1 for text in (f"### {pair}", seeded(found))]
    return f"""# How much it varies

Written by `python -m benchmarks.spread --zoo zoo --out docs/spread.md`; not edited by hand.

Merges at depth 1 of experts that were trained anew from other seeds: other initialisations and another order of the
training samples, on the same data. The figure is the median over the pairs of seeds, with the lowest and the highest
in brackets. *experts* is their mean score on the test split, the other columns what a merge keeps of it;
*{DEFAULT}* is what `hf_zipit.merge(experts, calibration)` does, and *CPU s* what that call takes.

{chr(10).join(f"| {' | '.join(cells)} |" for cells in lines)}

Calibration: {SAMPLES} unlabelled samples a task from the train split, seed {SEED}. Merging seed: {SEED}.
Training seeds: {seeds}.
Machine: {machines}, shared with other work. hf_zipit {__version__}, sources {versions}.

## Each pair of seeds

{(chr(10) * 2).join(parts)}
"""


def seeded(by_shift: dict[int, dict[str, Row]]) -> str:
    """The scores of every pair of seeds, by task."""
    tasks = list(next(iter(by_shift.values()))[EXPERTS].scores)
    lines = [["seeds", "row", *tasks, "of experts", "CPU s"], ["---", "---", *["---:"] * (len(tasks) + 2)]]
    for shift, rows in by_shift.items():
        pair = rows[EXPERTS].pair
        seeds = "/".join(str(seed + shift) for seed in RECIPES[pair].seeds.values())
        for method, row in rows.items():
            kept = f"{100 * row.mean / rows[EXPERTS].mean:.1f} %"
            cost = "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.1f}"
            lines.append([seeds, method, *(share(row.scores[task]) for task in tasks), kept, cost])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the zoo.")],
    out: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    pairs: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PAIRS)}; may be repeated.")] = None,
    numbers: Annotated[Path | None, typer.Option("--json", help="Where to keep the rows, and to find them.")] = None,
    measured: Annotated[bool, typer.Option("--measured", help="Train and measure nothing; use what is kept.")] = False,
) -> None:
    """Merge pairs of several seeds, and print how much what is kept varies."""
    chosen = checked("pair", pairs or list(PAIRS), PAIRS)
    for target in filter(None, (out, numbers)):
        check_writable(target.parent)
    kept = json.loads(numbers.read_text()) if numbers is not None and numbers.exists() else []
    rows: Seeded = {}
    for pair, shift, method in asked():
        known = next((entry for entry in kept if place_of(entry) == (pair, shift, method)), None)
        if known is None and not measured and pair in chosen:
            root = zoo / f"shift-{shift}" if shift else zoo
            build([pair], root, say=lambda text: typer.echo(text, err=True), shift=shift)
            depth = None if method == EXPERTS else 1.0
            request = {"pair": pair, "method": method, "depth": depth, "split": "test", "samples": SAMPLES}
            row = measure_apart(zoo=str(root), **request)
            if row.error:
                raise SystemExit(f"error: {pair}, seeds shifted by {shift}, {method}: {row.error}")
            kept.append(known := {"shift": shift, "row": asdict(row)})
            typer.echo(f"{pair} +{shift} {method}: {row.scores}", err=True)
            if numbers is not None:
                write_json(numbers, kept)
        if known is not None:
            rows.setdefault(pair, {}).setdefault(shift, {})[method] = Row(**known["row"])
    whole = {pair: {s: found for s, found in by.items() if len(found) == len(METHODS)} for pair, by in rows.items()}
    page = document({pair: by for pair, by in whole.items() if by})
    typer.echo(page)
    if out is not None:
        write_text(out, page)


if __name__ == "__main__":
    typer.run(main)
