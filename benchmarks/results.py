"""The table pair x method: how much of its experts' scores every method keeps, and what it costs.

    python -m benchmarks.results --zoo zoo --out docs/results.md

The zoo has to be trained before (`python -m benchmarks.zoo --out zoo`). Settings are chosen with `--split validation`;
the table in the documentation is of the test split. A line about every finished row goes to stderr, the table to
stdout and, if asked for, into a file. `--json` keeps the exact numbers, row by row; `--reuse` takes rows from there.
`--keep` leaves the other rows of the page as they are: with `--methods "permute + refit"` only that one is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from benchmarks.averages import HEADING, updated
from benchmarks.kept_rows import EARLIER, Key, digests, joined, machines, others, tables
from benchmarks.measure import EXPERTS, METHODS, REFERENCES, SEED, Row, measure_apart
from benchmarks.zoo import RECIPES
from hf_zipit import __version__
from hf_zipit.files import check_writable, write_json, write_text
from hf_zipit.report.tables import share

SAMPLES = 512
DEPTHS = (1.0, 0.5)
COLUMNS = ("mean", "of experts", "joint", "size", "seconds", "CPU s", "memory", "sources")


PARTS = """

The rows come from several runs of parts of this command, some beside other work on two cores: CPU seconds say more
than seconds."""


class Split(str, Enum):
    test = "test"
    validation = "validation"


# ------------------------------------------------------------------------------------------------ the document


Kept = Mapping[str, Mapping[Key, Mapping[str, str]]]
"""By pair and by method and depth: the cells of a row that stands on a page already."""


def document(rows: Sequence[Row], header: str, kept: Kept = MappingProxyType({})) -> str:
    """The whole page in Markdown: the header, and a section with a table for every pair."""
    present = {*kept, *(row.pair for row in rows)}
    sections = [
        section(pair, [row for row in rows if row.pair == pair], kept.get(pair, {}))
        for pair in RECIPES
        if pair in present
    ]
    return "\n\n".join([header, *sections]) + "\n"


def section(pair: str, rows: Sequence[Row], kept: Mapping[Key, Mapping[str, str]] = MappingProxyType({})) -> str:
    """One pair: what it is, its table, and why rows have no numbers."""
    recipe = RECIPES[pair]
    seeds = ", ".join(f"{task} {seed}" for task, seed in recipe.seeds.items())
    parts = [f"## {recipe.name}", f"{recipe.about}. Training seeds: {seeds}.", table(rows, kept)]
    parts += [f"{row.method} at depth {row.depth} failed: {row.error}" for row in rows if row.error]
    return "\n\n".join(parts)


def table(rows: Sequence[Row], kept: Mapping[Key, Mapping[str, str]] = MappingProxyType({})) -> str:
    """A Markdown table of one pair's rows, new and kept: the references first, then the methods in order, by depth."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.scores))
    whole = next((row.mean for row in rows if row.method == EXPERTS), None)
    heads = ["method", "depth", *tasks, *COLUMNS] if rows else [*next(iter(kept.values()))]
    new = [dict(zip(heads, cells(row, tasks, whole), strict=True)) for row in rows]
    lines = [[row[head] for head in heads] for row in joined(new, kept, [*REFERENCES, *METHODS])]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def cells(row: Row, tasks: Iterable[str], whole: float | None) -> list[str]:
    """One row as text. `whole`: the experts' mean score."""
    return [
        row.method,
        number(row.depth, "g"),
        *(share(row.scores.get(task)) for task in tasks),
        share(row.mean),
        number(100 * row.mean / whole, ".1f", " %") if row.mean is not None and whole else "-",
        share(row.joint),
        number(row.size, ".2f"),
        number(row.seconds, ".1f"),
        number(row.cpu_seconds, ".1f"),
        number(row.peak_mib, ".0f", " MiB"),
        row.sources or "-",
    ]


def number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def introduction(rows: Sequence[Row], command: str, page: str = "") -> str:
    """What the tables show and how to make them again. `page`: the one that rows are kept of."""
    kept = tables(page)
    present = {*(row.method for row in rows), *(method for pair in kept.values() for method, _ in pair)}
    measured = [row for row in rows if row.method in METHODS]
    splits = " and ".join(dict.fromkeys(row.split for row in rows))
    samples = " or ".join(str(count) for count in sorted({row.samples for row in measured if row.samples}))
    where = "; or ".join(dict.fromkeys([*machines(page), *(row.machine for row in rows)]))
    versions = ", ".join(f"`{digest}`" for digest in dict.fromkeys([*digests(page), *(row.sources for row in rows)]))
    old = any(row["sources"] == EARLIER for pair in kept.values() for row in pair.values())
    earlier = f"\n*{EARLIER}* stands for one of the digests below that no row names." if old else ""
    return f"""# Results

Written by `{command}`, with the experts of `python -m benchmarks.zoo --out zoo`; not edited by hand.

Two experts from different initialisations, trained on disjoint tasks, become one model without labels or gradients.
Scores are shares of hits on the {splits} split. `a` and `b` are within the task's own classes, *of experts* is their
mean in percent of the experts' mean, *joint* among the classes of both tasks when the task is not known (`-` where
both tasks have the same candidates). *depth* is the share of the blocks that is merged, *size* counts parameters,
with one expert as 1. *seconds*, *CPU s* (all threads) and *memory* (how far the resident memory rose, each row in a
process of its own) are those of one call of `merge`, its passes over the calibration data included. *sources* is a
digest of the code that made the row, and rows that differ in it are of different versions.{earlier}

Calibration: {samples or "no"} unlabelled samples a task from the train split, seed {SEED}. Merging seed: {SEED}.
Machine: {where}. hf_zipit {__version__}, sources {versions}.
Rows that mean nothing for a pair are left out: BatchNorm reset without BatchNorm, joint heads without classes,
*chosen* where nothing was chosen.

{legend(name for name in (REFERENCES | METHODS) if name in present)}"""


def legend(methods: Iterable[str]) -> str:
    """What each row is, and the arguments that make it."""
    names = list(methods)
    lines = ["| row | what it is | arguments of `merge` |", "| --- | --- | --- |"]
    for name in names:
        method = (REFERENCES | METHODS)[name]
        arguments = typed(method.settings)
        lines.append(f"| {name} | {method.about} | {f'`{arguments}`' if arguments else '-'} |")
    for pair, settings in (item for name in names for item in (REFERENCES | METHODS)[name].by_pair.items()):
        line = f"For {pair}, *chosen* is `{typed(settings)}`."
        lines += ["", line] if line not in lines else []
    return "\n".join(lines)


def typed(settings: Mapping[str, Any]) -> str:
    """Arguments as one types them."""
    return ", ".join(f"{key}={json_like(value)}" for key, value in settings.items())


def json_like(value: Any) -> str:
    """A setting as one types it, with double quotes."""
    return json.dumps(value).replace("true", "True").replace("false", "False").replace("null", "None")


# ------------------------------------------------------------------------------------------------- the command


def requests(pairs: Iterable[str], methods: Iterable[str], depths: Iterable[float]) -> Iterator[dict[str, Any]]:
    """Pair, method and depth of every row, in the table's order; depth varies fastest."""
    for pair in pairs:
        for reference in REFERENCES:
            yield {"pair": pair, "method": reference, "depth": None}
        for method in methods:
            for depth in depths:
                yield {"pair": pair, "method": method, "depth": depth}


def known_rows(files: Iterable[Path]) -> list[Row]:
    """The rows of earlier runs; those that failed are left out, so that they are measured again."""
    found = [Row(**row) for file in files for row in json.loads(file.read_text())["rows"]]
    return [row for row in found if not row.error]


def reused(rows: Iterable[Row], asked: Mapping[str, Any]) -> Row | None:
    """The last of the rows that answers what is asked: of the method, or else of another with the same settings."""
    given = dict(asked)
    samples, method = given.pop("samples"), given.pop("method")
    fitting = [
        row
        for row in rows
        if row.samples in (None, samples) and all(getattr(row, name) == value for name, value in given.items())
    ]
    for name in (method, *alike(method, given["pair"])):
        for row in reversed(fitting):
            if row.method == name:
                return replace(row, method=method)
    return None


def alike(method: str, pair: str) -> Iterator[str]:
    """The other methods that merge a pair by the same arguments: a chosen alignment may be one that has a row."""
    if method in METHODS:
        for name, other in METHODS.items():
            if name != method and other.settings_for(pair) == METHODS[method].settings_for(pair):
                yield name


def command_line(**options: Any) -> str:
    """The command with the options that are not their defaults; folders by their last name."""
    words = ["python -m benchmarks.results --zoo zoo --out docs/results.md"]
    for name, value in options.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words.append(f"--{name} {json.dumps(each) if ' ' in str(each) else each}")
    return " ".join(words)


def kept_page(out: Path | None, split: Split, samples: int) -> str:
    """The page whose rows are kept; leaves with a sentence if there is none, or one of other scores."""
    if out is None or not out.is_file():
        raise SystemExit("error: --keep leaves rows of a page as they are; name one that is there with --out.")
    page = out.read_text(encoding="utf-8")
    if f"hits on the {split.value} split" not in page or f"Calibration: {samples} unlabelled" not in page:
        raise SystemExit(f"error: {out} is not of the {split.value} split and {samples} samples; leave out --keep.")
    return page


def checked(kind: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The names, or all known ones; leaves with a sentence if one is unknown."""
    known = list(known)
    for name in names or ():
        if name not in known:
            raise SystemExit(f"error: there is no {kind} {name!r}; choose from: {', '.join(known)}.")
    return list(names or known)


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    out: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    pairs: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(RECIPES)}; may be repeated.")] = None,
    methods: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; may be repeated.")] = None,
    depths: Annotated[list[float] | None, typer.Option(help="Shares of the blocks; 1 and .5 if not given.")] = None,
    split: Annotated[Split, typer.Option(help="Where the scores come from.")] = Split.test,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples per task.")] = SAMPLES,
    numbers: Annotated[Path | None, typer.Option("--json", help="Where to keep the exact numbers.")] = None,
    reuse: Annotated[list[Path] | None, typer.Option(help="Take rows from such a file; may be repeated.")] = None,
    only_reused: Annotated[bool, typer.Option(help="Measure nothing: leave out what no such file has.")] = False,
    keep: Annotated[bool, typer.Option(help="Leave the other rows of the page at --out as they are.")] = False,
) -> None:
    """Merge the zoo's pairs by every method, and print the table."""
    chosen = {"pairs": pairs or [], "methods": methods or [], "depths": depths or []}
    pairs, methods = checked("pair", pairs, RECIPES), checked("method", methods, METHODS)
    for target in filter(None, (out, numbers)):
        check_writable(target.parent)
    old = kept_page(out, split, samples) if keep else ""
    known = known_rows(reuse or [])
    rows: list[Row] = []
    for request in requests(pairs, methods, depths or DEPTHS):
        asked = {**request, "split": split.value, "samples": samples}
        row = reused(known, asked) or (None if only_reused else measure_apart(zoo=str(zoo), **asked))
        if row is None:
            continue
        rows.append(row)
        typer.echo(f"{row.pair}: {row.error or ' '.join(cells(row, row.scores, None))}", err=True)
        if numbers is not None:
            write_json(numbers, {"rows": [asdict(each) for each in rows]})
    if not rows:
        raise SystemExit("error: no row was measured or found in the files of --reuse.")
    differing = {"split": split.value} if split != Split.test else {}
    differing |= {"samples": samples} if samples != SAMPLES else {}
    header = introduction(rows, command_line(**({} if keep else chosen), **differing), old)
    header += PARTS if only_reused or keep else ""
    page = document(rows, header, tables(old)) + others(old, [*RECIPES, HEADING.strip("# ")])
    typer.echo(page)
    if out is not None:
        write_text(out, updated(page))


if __name__ == "__main__":
    typer.run(main)
