"""What residues of a stated size give: by pair of the zoo, trunk, kind and size the score of every task alone.

    python -m benchmarks.residues --zoo zoo --pair fashion-vit --plot docs/pictures/sizes.png

Scores are of the validation split. The trunk is permuted and averaged; the default refit, whose weights residues
cannot be added to, stands beside it, as deep as it gets and with the last blocks left to every task. Where the tasks'
classes stand side by side, there are rows of SMILE as well: tokens find their residues, and the head alone is known.
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
from transformers.utils import ModelOutput
from transformers.utils.logging import disable_progress_bar

import hf_zipit
from benchmarks.measure import concatenates
from benchmarks.zoo import Pair, load
from benchmarks.zoo.pair import rows
from hf_zipit.align.stage import align_trunk
from hf_zipit.assembly.assemble import assemble
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.config import ResidueConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.observation.gather import gathered
from hf_zipit.report.plots import PANEL, look, panels, save_picture
from hf_zipit.residues.routing import add_router
from hf_zipit.residues.stage import add_residues

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1.03, 1.1, 1.25)
DEPTHS = (1.0, 0.75, 0.5)
SIDE_BY_SIDE = "experts side by side"
KINDS: tuple[tuple[dict[str, Any], bool], ...] = (
    *(({"kind": kind, "size": size}, True) for kind in ("signs", "low-rank") for size in SIZES),
    *(({"kind": kind, "size": 1.1}, False) for kind in ("signs", "low-rank")),
    *(({"kind": "t-switch", "options": {"share": share}}, False) for share in (0.25, 0.5)),
    ({"kind": "tall", "options": {"threshold": 1.0}}, False),
    ({"kind": "emr"}, False),
)
"""The settings of residues that are tried, and whether they read statistics."""

SMILE = "permute, low-rank, smile"
RANKS = (1, 4, 16, 64)
"""So many directions of a task's weights say how much of a token is its task's."""


def scores(pair: Pair, model: PreTrainedModel, samples: int) -> dict[str, float]:
    """By task, on as many validation samples."""
    return {
        task: pair.metric.hits(
            partial(model, task=task), rows(pair.splits[task]["validation"], slice(samples)),
            pair.metric.prompts.get(task, {}),
        )
        for task in pair.experts
    }  # fmt: skip


def routed_scores(pair: Pair, model: PreTrainedModel, samples: int) -> dict[str, float]:
    """The same where no task is named, among the task's own classes."""

    def within(task: str, **inputs: Any) -> ModelOutput:
        start, count = model.config.offsets()[task], len(model.config.labels_of(task))
        return ModelOutput(logits=model(**inputs).logits[..., start : start + count])

    return {
        task: pair.metric.hits(partial(within, task), rows(pair.splits[task]["validation"], slice(samples)), {})
        for task in pair.experts
    }


@dataclass(frozen=True)
class Row:
    """A model's score.

    Attributes:
        line: what models of several sizes have in common.
        about: the rest.
        size: in parameters or bytes, with one expert, or the merged model without residues, as 1.
        scores: by task.
    """

    line: str
    about: str
    size: float
    scores: Mapping[str, float]

    def kept(self, own: Mapping[str, float]) -> float:
        """The mean share of the experts' own scores."""
        return sum(self.scores[task] / own[task] for task in own) / len(own)


def table(name: str, rows: Sequence[Row]) -> str:
    """The table of one pair; the first row is the experts'."""
    own = rows[0].scores
    lines = [f"\n{name}\n\n| | size | {' | '.join(own)} | of experts |\n| --- | ---: |{' ---: |' * (len(own) + 1)}"]
    for row in rows:
        cells = " | ".join(f"{row.scores[task]:.3f}" for task in own)
        about = ", ".join(filter(None, (row.line, row.about)))
        lines.append(f"| {about} | {row.size:.3f} | {cells} | {100 * row.kept(own):.1f} % |")
    return "\n".join(lines)


def measured(pair: Pair, calibration: Mapping[str, Any], samples: int) -> Iterator[Row]:
    """The rows of one pair, the experts first."""
    own = {
        task: pair.metric.hits(
            expert, rows(pair.splits[task]["validation"], slice(samples)), pair.metric.prompts.get(task, {})
        )
        for task, expert in pair.experts.items()
    }
    yield Row(SIDE_BY_SIDE, "", len(own), own)
    one = next(iter(pair.experts.values())).num_parameters()
    for depth in DEPTHS:
        default = hf_zipit.merge(pair.experts, calibration, depth=depth)
        yield Row("default refit", f"depth {depth:g}", default.num_parameters() / one, scores(pair, default, samples))
    planned = hf_zipit.plan(pair.experts, method="permute", residues=True)
    data = Calibration(calibration).read(planned.experts)
    maps = align_trunk(planned, hf_zipit.observe(planned, data))
    merged = assemble(planned, combine_trunk(planned, maps), maps)
    yield Row("permute", "", 1.0, scores(pair, merged, samples))
    statistics = gathered(planned.folded, data, kinds=["grams"])
    for settings, reading in KINDS:
        config = replace(planned.config, residues=ResidueConfig(**settings))
        model = copy.deepcopy(merged)
        add_residues(model, replace(planned, config=config), maps, statistics if reading else None)
        bare, more = residue_bytes(model)
        by_weights = "size" in settings and not reading
        line = f"permute, {settings['kind']}" + (", by weights" if by_weights else "")
        about = ", ".join(f"{k} {v}" for k, v in settings.get("options", {}).items())
        yield Row(line, about, 1 + more / bare, scores(pair, model, samples))
    for rank in RANKS if concatenates(pair) else ():
        kept = ResidueConfig(kind="low-rank", size=1.25, router="smile", router_options={"rank": rank})
        routed, model = replace(planned, config=replace(planned.config, residues=kept)), copy.deepcopy(merged)
        add_residues(model, routed, maps)
        add_router(model, routed, maps, None)
        bare, more = residue_bytes(model)
        yield Row(SMILE, f"rank {rank}", 1 + more / bare, routed_scores(pair, model, samples))


def picture(found: Mapping[str, Sequence[Row]]) -> Figure:
    """What is kept over the size, a panel for each pair."""
    labels = "size, with one model as 1", "share of the experts' scores"
    with panels(list(found), *labels, width=1.25 * PANEL, height=4.2) as axes:
        for axis, rows in zip(axes, found.values(), strict=True):
            own, start = rows[0].scores, next(row for row in rows if row.line == "permute")
            lines = dict.fromkeys(row.line for row in rows[1:] if row.line not in ("permute", SMILE))
            for index, line in enumerate(lines):
                of_kind = [row for row in rows if row.line == line]
                points = sorted((row.size, row.kept(own)) for row in of_kind)
                if line.endswith(("signs", "low-rank")):
                    points = [(1.0, start.kept(own)), *points]
                axis.plot(
                    *zip(*points, strict=True),
                    label=line,
                    markersize=5.5,
                    linewidth=1.8,
                    zorder=3 + index,
                    **look(index),
                )
            axis.plot(
                [rows[0].size], [1], label=SIDE_BY_SIDE, marker="*", markersize=11, linestyle="none", color="black"
            )
            axis.yaxis.set_major_formatter("{x:.0%}")
    return axes[0].figure


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the zoo.")],
    pair: Annotated[list[str], typer.Option(help="Pairs of the zoo.")],
    calibration: Annotated[int, typer.Option(help="Unlabelled training samples of every task.")] = 256,
    samples: Annotated[int, typer.Option(help="Validation samples of every task.")] = 1000,
    plot: Annotated[Path | None, typer.Option(help="Draw what is kept over the size into this file.")] = None,
) -> None:
    """Measure some pairs."""
    disable_progress_bar()
    every: dict[str, list[Row]] = {}
    for name in pair:
        found = load(name, zoo, train=False)
        generator = torch.Generator().manual_seed(0)
        data = {}
        for task, parts in found.splits.items():
            train = {key: value for key, value in parts["train"].items() if key != "labels"}
            chosen = torch.randperm(len(next(iter(train.values()))), generator=generator)[:calibration]
            data[task] = rows(train, chosen)
        with torch.no_grad():
            every[name] = list(measured(found, data, samples))
        typer.echo(table(name, every[name]))
    if plot is not None:
        save_picture(picture(every), plot)


if __name__ == "__main__":
    typer.run(main)
