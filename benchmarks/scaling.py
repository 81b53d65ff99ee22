"""What a merge keeps as experts become more: 2, 3, 4, 6 and 8 of them, in two widths, and what it costs.

    python -m benchmarks.scaling --zoo zoo --out docs/scaling.md --plot docs/pictures/scaling.png

The experts are those of `many-8` and `many-8-narrow`, which have to be trained before. Every row is measured in a
process of its own, as in the results; `--json` keeps the exact numbers and takes those that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.measure import EXPERTS, METHODS, SEED, Row, measure_apart
from benchmarks.results import SAMPLES, known_rows, number, reused
from benchmarks.zoo.table import COUNTS, RECIPES
from hf_zipit import __version__
from hf_zipit.files import check_writable, write_json, write_text
from hf_zipit.report.plots import look, panels, save_picture
from hf_zipit.report.tables import share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = {RECIPES[f"many-{COUNTS[0]}{end}"].width: end for end in ("", "-narrow")}
"""By the experts' width the end of their names in the zoo."""

DEFAULT = "permute + refit"
ROWS = (EXPERTS, "average", "permute", DEFAULT)


def shares(row: Row, own: Row) -> list[float]:
    """Of every task the share of its expert's own score."""
    return [row.scores[task] / own.scores[task] for task in own.scores]


def mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def told(row: Row, own: Row) -> list[str]:
    """The cells of a row: the mean and the least of the shares, size and cost."""
    found = shares(row, own)
    least = f"{100 * min(found):.1f} % ({list(own.scores)[found.index(min(found))]})"
    return [
        row.method,
        share(row.mean),
        f"{100 * mean(found):.1f} %",
        "-" if row is own else least,
        number(row.size, ".2f"),
        number(row.cpu_seconds, ".0f"),
    ]


def summary(by_count: dict[int, dict[str, Row]]) -> str:
    """One width's least and largest group in a sentence; empty where the default was measured of one alone."""
    measured = [(count, own[DEFAULT], own[EXPERTS]) for count, own in by_count.items() if DEFAULT in own]
    if len(measured) < 2:
        return ""
    (few, first, own), (many, last, last_own) = measured[0], measured[-1]
    kept, then = shares(first, own), shares(last, last_own)
    return (
        f"From {few} to {many} experts the default's mean share goes from {100 * mean(kept):.1f} to "
        f"{100 * mean(then):.1f} %, the least from {100 * min(kept):.1f} to {100 * min(then):.1f} %, the size from "
        f"{first.size:.2f} to {last.size:.2f}, the work from {first.cpu_seconds:.0f} to {last.cpu_seconds:.0f} CPU s."
    )


def grouped(rows: Sequence[Row]) -> dict[int, dict[int, dict[str, Row]]]:
    """Rows by width, number of experts and method."""
    found: dict[int, dict[int, dict[str, Row]]] = {}
    for width, end in WIDTHS.items():
        for count in COUNTS:
            own = {row.method: row for row in rows if row.pair == f"many-{count}{end}" and not row.error}
            if EXPERTS in own:
                found.setdefault(width, {})[count] = own
    return found


def table(by_count: dict[int, dict[str, Row]]) -> str:
    """One width's rows in Markdown."""
    heads = ["experts", "row", "mean score", "mean share", "least share", "size", "CPU s"]
    lines = [heads, ["---:", "---", *["---:"] * (len(heads) - 2)]]
    for count, own in by_count.items():
        lines += [[str(count), *told(own[method], own[EXPERTS])] for method in ROWS if method in own]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(rows: Sequence[Row], samples: int, picture: str | None) -> str:
    """The whole page in Markdown; `picture` is its path from there."""
    machines = "; or ".join(dict.fromkeys(row.machine for row in rows if row.machine))
    versions = ", ".join(f"`{digest}`" for digest in dict.fromkeys(row.sources for row in rows if row.sources))
    tasks = ", ".join(f"{task} ({seed})" for task, seed in RECIPES[f"many-{COUNTS[-1]}"].seeds.items())
    parts = [
        f"""# More experts

Written by `python -m benchmarks.scaling --zoo zoo --out docs/scaling.md --plot docs/pictures/scaling.png`, with the
experts of `python -m benchmarks.zoo --out zoo --only many-8 --only many-8-narrow`; not edited by hand.

Small ViTs (4 layers) of one width, from different initialisations and on different tasks of small grey images, merged
at depth 1. T experts are the first T of
{tasks},
with the seeds of their training in brackets; so a larger group has other tasks as well, easier ones towards the end.
*share* is of the expert's own score on the test split, the mean over the tasks and the least with its task; *size*
counts parameters, with one expert as 1, all tasks' heads and maps to them included; *CPU s* is what one call of
`merge` takes. *permute + refit* is what `hf_zipit.merge(experts, calibration)` does. One set of seeds was trained for
each width; [how much other seeds change](spread.md) was measured for other pairs.

Calibration: {samples} unlabelled samples a task from the train split, seed {SEED}. Merging seed: {SEED}.
Machine: {machines}. hf_zipit {__version__}, sources {versions}."""
    ]
    if picture:
        parts.append(
            f"![What is kept over the number of experts]({picture})\n\nLines are means, shades go down to the least."
        )
    for width, by_count in grouped(rows).items():
        parts += filter(None, [f"## Width {width}", summary(by_count), table(by_count)])
    parts += [f"{row.pair} {row.method} failed: {row.error}" for row in rows if row.error]
    return "\n\n".join(parts) + "\n"


def drawn(rows: Sequence[Row]) -> Figure:
    """The mean share over the number of experts, and down to the least one, a panel for each width."""
    found = grouped(rows)
    names = [f"width {width}" for width in found]
    with panels(names, "experts", "share of the experts' scores") as axes:
        for axis, by_count in zip(axes, found.values(), strict=True):
            for index, method in enumerate(ROWS[1:]):
                kept = {n: shares(own[method], own[EXPERTS]) for n, own in by_count.items() if method in own}
                means = [mean(values) for values in kept.values()]
                axis.plot(list(kept), means, label=method, linewidth=1.8, markersize=5.5, **look(index))
                axis.fill_between(list(kept), [min(v) for v in kept.values()], means, color=look(index)["color"],
                                  alpha=0.15, linewidth=0)  # fmt: skip
            axis.set_xticks(COUNTS)
            axis.set_ylim(0, 1.05)
            axis.yaxis.set_major_formatter("{x:.0%}")
    return axes[0].figure


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    out: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the shares into this file.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Widths to measure; all if not given.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples per task.")] = SAMPLES,
    numbers: Annotated[Path | None, typer.Option("--json", help="Where to keep the exact numbers.")] = None,
) -> None:
    """Merge groups of the zoo's many experts, and print the table."""
    for target in filter(None, (out, plot, numbers)):
        check_writable(target.parent)
    rows = known_rows([numbers] if numbers is not None and numbers.is_file() else [])
    for end in (end for own, end in WIDTHS.items() if own in (width or WIDTHS)):
        for count in COUNTS:
            for method in ROWS:
                depth = 1.0 if method in METHODS else None
                asked = {
                    "pair": f"many-{count}{end}",
                    "method": method,
                    "depth": depth,
                    "split": "test",
                    "samples": samples,
                }
                if reused(rows, asked) is not None:
                    continue
                row = measure_apart(zoo=str(zoo), **asked)
                rows += [] if row is None else [row]
                if numbers is not None:
                    write_json(numbers, {"rows": [asdict(each) for each in rows]})
    page = document(rows, samples, None if plot is None else f"pictures/{plot.name}")
    typer.echo(page)
    if plot is not None:
        save_picture(drawn(rows), plot)
    if out is not None:
        write_text(out, page)


if __name__ == "__main__":
    typer.run(main)
