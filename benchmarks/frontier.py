"""How near the closed form is to what a model of one expert's size can reach: the hard pairs and their ceilings.

    python -m benchmarks.frontier --zoo zoo --out docs/frontier.md

The zoo has to be trained before. Every row is measured in a process of its own, as in the results; `--json` keeps the
exact numbers, `--reuse` takes rows from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.ceiling import CEILING, START, STEPS, measure_ceiling
from benchmarks.measure import EXPERTS, METHODS, SEED, Row, measure, measure_apart
from benchmarks.results import SAMPLES, Split, checked, known_rows, number, reused
from benchmarks.sampling import updated
from benchmarks.zoo import RECIPES, load
from hf_zipit import __version__
from hf_zipit.files import check_writable, write_json, write_text
from hf_zipit.report.tables import share

PAIRS = (
    "chars-roberta",
    "chars-mixed",
    "text-llama",
    "text-gpt2",
    "text-qwen3",
    "text-neox",
    "text-olmo2",
    "text-gemma2",
    "seq2seq-t5",
    "speech",
    "segmentation",
    "detection",
    "many-4",
    "many-8",
)
EXCHANGED = "experts, exchanged"
ALIGNMENTS = ("average", "permute")
ROWS = (EXPERTS, EXCHANGED, *ALIGNMENTS, "permute + refit", CEILING)
ABOUT = {
    EXPERTS: "each expert on its own task",
    EXCHANGED: "each task by the other experts, on average",
    **{name: METHODS[name].about for name in ROWS if name in METHODS},
    CEILING: f"the model of *{START}*, distilled from its experts on the same samples in {STEPS} steps of Adam",
}


def measure_row(zoo: str, pair: str, method: str, depth: float | None, split: str, samples: int) -> Row | None:
    """One row of the frontier; None if it does not fit the pair."""
    if method == CEILING:
        return measure_ceiling(zoo, pair, split, samples)
    if method == EXCHANGED:
        return exchanged(zoo, pair, split)
    return measure(zoo, pair, method, depth, split, samples)


def exchanged(zoo: str, pair: str, split: str) -> Row | None:
    """Every task by the experts of the others, on average; None where the tasks have candidates of their own."""
    loaded = load(pair, zoo, train=False)
    if loaded.metric.classes is not None:
        return None
    scores = {}
    for task in loaded.experts:
        others = [loaded.score(expert, task, split) for name, expert in loaded.experts.items() if name != task]
        scores[task] = sum(others) / len(others)
    return Row(pair, EXCHANGED, None, split, None, scores=scores, size=1.0)


def table(rows: Sequence[Row]) -> str:
    """One pair's rows in Markdown."""
    means = {row.method: row.mean for row in rows if row.mean is not None}
    tasks = list(dict.fromkeys(task for row in rows for task in row.scores))
    perplexed = [task for task in tasks if any(task in row.perplexities for row in rows)]
    heads = [
        "row",
        *tasks,
        "mean",
        "of experts",
        "of the way",
        *(f"perplexity {t}" for t in perplexed),
        "size",
        "CPU s",
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        whole, way = means.get(EXPERTS), progress(row, means)
        lines.append(
            [
                row.method,
                *(share(row.scores.get(task)) for task in tasks),
                share(row.mean),
                number(100 * row.mean / whole, ".1f", " %") if row.mean is not None and whole else "-",
                number(None if way is None else 100 * way, ".0f", " %"),
                *(number(row.perplexities.get(task), ".2f") for task in perplexed),
                number(row.size, ".2f"),
                number(row.cpu_seconds, ".0f"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def progress(row: Row, means: dict[str, float]) -> float | None:
    """The share of the way from the best alignment (0) to the ceiling (1); None for the references."""
    best = max((means[name] for name in ALIGNMENTS if name in means), default=None)
    if row.depth is None or row.mean is None or best is None or CEILING not in means or means[CEILING] <= best:
        return None
    return (row.mean - best) / (means[CEILING] - best)


def document(rows: Sequence[Row], split: str, samples: int, command: str) -> str:
    """The whole page in Markdown."""
    machines = "; or ".join(dict.fromkeys(row.machine for row in rows if row.machine))
    versions = versions_of(rows)
    legend = "\n".join(["| row | what it is |", "| --- | --- |", *(f"| {name} | {ABOUT[name]} |" for name in ROWS)])
    parts = [
        f"""# The frontier

Written by `{command}`,
with the experts of `python -m benchmarks.zoo --out zoo`; not edited by hand.

Pairs that were made because they hurt, at depth 1, and the *ceiling*: what a model of the same size reaches when it
learns from the same experts on the same unlabelled samples by gradients. Scores are shares of hits on the {split}
split; *of experts* is their mean in percent of the experts' mean, *of the way* the share of the way from the best
alignment (0 %) to the ceiling (100 %), *size* counts parameters, with one expert as 1, heads of all tasks included.
Every pair was trained from one pair of seeds; [how much it varies](spread.md) between pairs of seeds was measured for
some. The sampling error below the pairs is that of the test split, at 95 % (binomial).

Calibration: {samples} unlabelled samples a task from the train split, seed {SEED}. Merging seed: {SEED}.
Machine: {machines}. hf_zipit {__version__}, sources {versions}.

{legend}"""
    ]
    for pair in dict.fromkeys(row.pair for row in rows):
        own = [row for row in rows if row.pair == pair]
        about = f"{RECIPES[pair].about}."
        if versions_of(own) != versions:
            about += f" Sources {versions_of(own)}."
        parts += [f"## {pair}", about, table(own)]
        parts += [f"{row.method} failed: {row.error}" for row in own if row.error]
    return "\n\n".join(parts) + "\n"


def versions_of(rows: Sequence[Row]) -> str:
    """The versions of the package's sources that rows were measured with."""
    return ", ".join(f"`{digest}`" for digest in dict.fromkeys(row.sources for row in rows if row.sources))


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    out: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    pairs: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PAIRS)}; may be repeated.")] = None,
    split: Annotated[Split, typer.Option(help="Where the scores come from.")] = Split.test,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples per task.")] = SAMPLES,
    numbers: Annotated[Path | None, typer.Option("--json", help="Where to keep the exact numbers.")] = None,
    reuse: Annotated[list[Path] | None, typer.Option(help="Take rows from such a file; may be repeated.")] = None,
    reused_only: Annotated[bool, typer.Option("--reused-only", help="Measure nothing; show what is reused.")] = False,
) -> None:
    """Measure the hard pairs and their ceilings, and print the tables."""
    for target in filter(None, (out, numbers)):
        check_writable(target.parent)
    known, rows = known_rows(reuse or []), []
    for pair in checked("pair", pairs or PAIRS, RECIPES):
        for method in ROWS:
            depth = None if method in (EXPERTS, EXCHANGED) else 1.0
            asked = {"pair": pair, "method": method, "depth": depth, "split": split.value, "samples": samples}
            row = reused(known, asked)
            if row is None and not reused_only:
                row = measure_apart(measure_row, zoo=str(zoo), **asked)
            if row is None:
                continue
            rows.append(row)
            typer.echo(f"{pair} {method}: {row.error or row.scores}", err=True)
            if numbers is not None:
                write_json(numbers, {"rows": [asdict(each) for each in rows]})
    words = [
        "python -m benchmarks.frontier --zoo zoo --out docs/frontier.md",
        *(f"--pairs {pair}" for pair in pairs or ()),
    ]
    words += [f"--split {split.value}"] if split != Split.test else []
    words += [f"--samples {samples}"] if samples != SAMPLES else []
    page = updated(document(rows, split.value, samples, " ".join(words)), zoo)
    typer.echo(page)
    if out is not None:
        write_text(out, page)


if __name__ == "__main__":
    typer.run(main)
