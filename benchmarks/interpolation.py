"""The line between two multimodal experts, as in UnIVAL (arXiv 2307.16184): what models on the way know.

    python -m benchmarks.interpolation --zoo zoo --out docs/interpolation.md --plot docs/pictures/interpolation.png

Two CLIPs of one base, which are trained here (the base on a little of both tasks, then each on its own), and the two
of the zoo's `captions-clip`, from different initialisations, as they are and with their units paired. A model on the
way has the weights (1 - share) a + share b; both tasks are scored by zero-shot classification of test images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hf_zipit
from benchmarks.measure import machine, sources
from benchmarks.zoo import Pair, load
from benchmarks.zoo.pair import Tensors, concatenate, rows
from benchmarks.zoo.pairs.captions_clip import CaptionsClip
from benchmarks.zoo.recipe import Schedule
from benchmarks.zoo.training import fit
from hf_zipit.files import check_writable, write_text
from hf_zipit.report.plots import look, panels, save_picture
from hf_zipit.report.tables import share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIR = "captions-clip"
SHARES = tuple(i / 10 for i in range(11))
SCORED = 1000  # test images of every task
BASE_SAMPLES, SAMPLES = 8000, 12000  # of every task, for the base and for an expert
CALIBRATION, SEED = 512, 0

ONE_BASE, APART, PAIRED = "one base", "different initialisations", "different initialisations, units paired"


@dataclass(frozen=True)
class Line:
    """By task the scores on the way from the first expert to the second, one for each of `SHARES`."""

    about: str
    scores: Mapping[str, Sequence[float]]

    @property
    def kept(self) -> list[float]:
        """The mean over the tasks of the share of the expert's own score."""
        first, second = self.scores.values()
        return [(a / first[0] + b / second[-1]) / 2 for a, b in zip(first, second, strict=True)]


def of_one_base(pair: Pair) -> dict[str, PreTrainedModel]:
    """Two experts that start at one base, which has seen a little of both tasks."""
    recipe, train = CaptionsClip(), {task: parts["train"] for task, parts in pair.splits.items()}
    recipe.schedule = replace(recipe.schedule, epochs=1)

    def some(task: str, start: int, count: int) -> Tensors:
        return rows(train[task], slice(start, start + count))

    torch.manual_seed(SEED)
    base = recipe.untrained("a", pair.tokenizer)
    fit(recipe, base, concatenate([some(task, 0, BASE_SAMPLES) for task in train]), SEED, pair.tokenizer, "base")
    recipe.schedule = Schedule(epochs=1, batch_size=64, learning_rate=3e-4, weight_decay=0.05)
    experts = {}
    for number, task in enumerate(train):
        experts[task] = copy.deepcopy(base)
        fit(recipe, experts[task], some(task, BASE_SAMPLES, SAMPLES), 1 + number, pair.tokenizer, task)
    return experts


def on_the_way(pair: Pair, experts: Mapping[str, PreTrainedModel], method: str, data: Any) -> dict[str, list[float]]:
    """By task the scores of the models between two experts, each read through the task's own modules."""
    found: dict[str, list[float]] = {task: [] for task in experts}
    test = {task: rows(pair.splits[task]["test"], slice(SCORED)) for task in experts}
    plain: dict[str, Any] = {"method": method, "refit": False, "corrections": ()}
    moments = None if data is None else hf_zipit.observe(hf_zipit.plan(experts, **plain), hf_zipit.Calibration(data))
    for part in SHARES:
        weights = dict(zip(experts, (1 - part, part), strict=True))
        merged = hf_zipit.merge(
            experts, moments=moments, combine="weighted", combine_options={"weights": weights}, **plain
        )
        for task in experts:
            hits = pair.metric.hits(partial(merged, task=task), test[task], pair.metric.prompts.get(task, {}))
            found[task].append(hits)
    return found


def lines(pair: Pair) -> Iterator[Line]:
    """One after the other."""
    yield Line(ONE_BASE, on_the_way(pair, of_one_base(pair), "identity", None))
    yield Line(APART, on_the_way(pair, pair.experts, "identity", None))
    data = {task: pair.calibration(task, CALIBRATION, SEED) for task in pair.experts}
    yield Line(PAIRED, on_the_way(pair, pair.experts, "permute", data))


def document(found: Sequence[Line], picture: str | None) -> str:
    """The page in Markdown; `picture` is its path from there."""
    heads = ["share of the second", *(f"{part:g}" for part in SHARES)]
    table = [heads, ["---", *["---:"] * len(SHARES)]]
    for line in found:
        table += [[f"{line.about}, task {task}", *map(share, scores)] for task, scores in line.scores.items()]
        table.append([f"{line.about}, of experts", *(f"{100 * kept:.1f} %" for kept in line.kept)])
    middle = "; ".join(f"{line.about}: {100 * line.kept[len(SHARES) // 2]:.1f} %" for line in found)
    shown = f"![Shares of the experts' scores on the way]({picture})\n\n" if picture else ""
    return f"""# Between two multimodal experts

Written by `python -m benchmarks.interpolation --zoo zoo --out docs/interpolation.md --plot
docs/pictures/interpolation.png`; not edited by hand.

[UnIVAL](https://arxiv.org/abs/2307.16184) interpolates the weights of multimodal experts of one base and finds models
that know both tasks. Here two small CLIPs match garments with captions, five kinds each; a model on the way is
`hf_zipit.merge(experts, combine="weighted", combine_options={{"weights": ...}})`, and is scored on {SCORED:,} test
images of each task by zero-shot classification among the task's own kinds. The base saw {BASE_SAMPLES:,} captioned
images of each task and the experts {SAMPLES:,} of their own, once; those from different initialisations are the zoo's
`{PAIR}`, whose units are paired by `method="permute"` with {CALIBRATION} unlabelled pairs of each task. Once, with
seed {SEED}.

What is left of the experts' scores in the middle, where plain averaging lands: {middle}. What a refit of experts of
different initialisations keeps is in [the results](results.md#{PAIR}).

{shown}{chr(10).join(f"| {' | '.join(cells)} |" for cells in table)}

Machine: {machine()}. Sources `{sources()}`.
"""


def drawn(found: Sequence[Line]) -> Figure:
    """A panel for each line: both tasks' scores, and what is kept of the experts on average."""
    names = [line.about.replace(", ", ",\n") for line in found]
    with panels(names, "share of the second expert", "share of the experts' scores") as axes:
        for axis, line in zip(axes, found, strict=True):
            own = {task: scores[place] for place, (task, scores) in zip((0, -1), line.scores.items(), strict=True)}
            for index, (task, scores) in enumerate(line.scores.items()):
                axis.plot(SHARES, [score / own[task] for score in scores], label=f"task {task}", **look(index))
            axis.plot(SHARES, line.kept, label="both", color="black", linestyle="--")
            axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter("{x:.0%}")
    return axes[0].figure


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    out: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the lines into this file.")] = None,
) -> None:
    """Measure the three lines and print the page."""
    disable_progress_bar()
    for target in filter(None, (out, plot)):
        check_writable(target.parent)
    found = list(lines(load(PAIR, zoo, train=False)))
    page = document(found, None if plot is None else f"pictures/{plot.name}")
    typer.echo(page)
    if plot is not None:
        save_picture(drawn(found), plot)
    if out is not None:
        write_text(out, page)


if __name__ == "__main__":
    typer.run(main)
