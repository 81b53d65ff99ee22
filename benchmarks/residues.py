"""What residues of a stated size give: by pair of the zoo, trunk, kind and size the score of every task alone.

    python -m benchmarks.residues --zoo zoo --pair fashion-vit

Scores are of the validation split. The trunk is permuted and averaged; the default refit, whose weights residues
cannot be added to, stands beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hf_zipit
from benchmarks.zoo import Pair, load
from benchmarks.zoo.pair import rows
from hf_zipit.align.stage import align_trunk
from hf_zipit.assembly.assemble import assemble
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.config import ResidueConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.observation.gather import gathered
from hf_zipit.residues.stage import add_residues

SIZES = (1.03, 1.1, 1.25)
KINDS: tuple[tuple[dict[str, Any], bool], ...] = (
    *(({"kind": kind, "size": size}, True) for kind in ("signs", "low-rank") for size in SIZES),
    *(({"kind": kind, "size": 1.1}, False) for kind in ("signs", "low-rank")),
    *(({"kind": "t-switch", "options": {"share": share}}, False) for share in (0.25, 0.5)),
    ({"kind": "tall", "options": {"threshold": 1.0}}, False),
    ({"kind": "emr"}, False),
)
"""The settings of residues that are tried, and whether they read statistics."""


def scores(pair: Pair, model: PreTrainedModel, samples: int) -> dict[str, float]:
    """By task, on as many validation samples."""
    return {
        task: pair.metric.hits(
            partial(model, task=task), rows(pair.splits[task]["validation"], slice(samples)),
            pair.metric.prompts.get(task, {}),
        )
        for task in pair.experts
    }  # fmt: skip


def row(name: str, size: float | None, found: Mapping[str, float], own: Mapping[str, float]) -> str:
    """A line of the table: the tasks, and the mean share of the experts' own scores."""
    kept = sum(found[task] / own[task] for task in own) / len(own)
    cells = " | ".join(f"{found[task]:.3f}" for task in own)
    return f"| {name} | {'' if size is None else f'{size:.3f}'} | {cells} | {100 * kept:.1f} % |"


def measured(pair: Pair, calibration: Mapping[str, Any], samples: int) -> None:
    """Print the table of one pair."""
    own = {
        task: pair.metric.hits(
            expert, rows(pair.splits[task]["validation"], slice(samples)), pair.metric.prompts.get(task, {})
        )
        for task, expert in pair.experts.items()
    }
    typer.echo(
        f"\n{pair.name}\n\n| | size | {' | '.join(own)} | of experts |\n| --- | ---: |{' ---: |' * (len(own) + 1)}"
    )
    typer.echo(row("experts", None, own, own))
    default = hf_zipit.merge(pair.experts, calibration)
    typer.echo(row("default refit", 1.0, scores(pair, default, samples), own))
    planned = hf_zipit.plan(pair.experts, method="permute", residues=True)
    data = Calibration(calibration).read(planned.experts)
    maps = align_trunk(planned, hf_zipit.observe(planned, data))
    merged = assemble(planned, combine_trunk(planned, maps), maps)
    typer.echo(row("permute", 1.0, scores(pair, merged, samples), own))
    statistics = gathered(planned.folded, data, kinds=["grams"])
    for settings, reading in KINDS:
        config = replace(planned.config, residues=ResidueConfig(**settings))
        model = copy.deepcopy(merged)
        add_residues(model, replace(planned, config=config), maps, statistics if reading else None)
        bare, more = residue_bytes(model)
        about = ", ".join([settings["kind"], *(f"{k} {v}" for k, v in settings.get("options", {}).items())])
        about += ", by weights" if "size" in settings and not reading else ""
        typer.echo(row(f"permute, {about}", 1 + more / bare, scores(pair, model, samples), own))


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the zoo.")],
    pair: Annotated[list[str], typer.Option(help="Pairs of the zoo.")],
    calibration: Annotated[int, typer.Option(help="Unlabelled training samples of every task.")] = 256,
    samples: Annotated[int, typer.Option(help="Validation samples of every task.")] = 1000,
) -> None:
    """Measure some pairs."""
    disable_progress_bar()
    for name in pair:
        found = load(name, zoo, train=False)
        generator = torch.Generator().manual_seed(0)
        data = {}
        for task, parts in found.splits.items():
            train = {key: value for key, value in parts["train"].items() if key != "labels"}
            chosen = torch.randperm(len(next(iter(train.values()))), generator=generator)[:calibration]
            data[task] = rows(train, chosen)
        with torch.no_grad():
            measured(found, data, samples)


if __name__ == "__main__":
    typer.run(main)
