"""What is learnt on unlabelled data, with the experts of one base of `benchmarks.same_base`: two and four tasks.

    python -m benchmarks.learnt

Every kind of `polish` goes on from task arithmetic, AdaMerging from TIES as well, all with the same few steps; the
refit and its readout maps, which are solved and not learnt, stand beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import typer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.measure import machine, sources
from benchmarks.same_base import CALIBRATION, SEEDS, TASKS, World, refit_rows, table, trained_base, trained_expert

STEPS = 200
FEW = {"steps": STEPS, "evaluate_every": 25}
ARITHMETIC = {"method": "identity", "refit": False, "corrections": (), "combine": "task-arithmetic"}
TIES = {**ARITHMETIC, "combine": "ties"}
ROWS: dict[str, dict[str, Any]] = {
    "task arithmetic": ARITHMETIC,
    "TIES": TIES,
    "AdaMerging": {**ARITHMETIC, "polish": {"kind": "adamerging", **FEW}},
    "AdaMerging, task-wise": {
        **ARITHMETIC, "polish": {"kind": "adamerging", "options": {"layerwise": False}, **FEW}
    },
    "AdaMerging after TIES": {**TIES, "polish": {"kind": "adamerging", **FEW}},
    "surgery": {**ARITHMETIC, "polish": {"kind": "surgery", **FEW}},
    "surgery, all blocks": {**ARITHMETIC, "polish": {"kind": "surgery", "options": {"blocks": True}, **FEW}},
    "SyMerge": {**ARITHMETIC, "polish": {"kind": "symerge", **FEW}},
    "Concrete mask": {**ARITHMETIC, "polish": {"kind": "concrete", **FEW}},
    "WEMoE": {**ARITHMETIC, "polish": {"kind": "wemoe", **FEW}},
    "WEMoE, distilled": {**ARITHMETIC, "polish": {"kind": "wemoe-distilled", **FEW}},
    "all weights": {**ARITHMETIC, "polish": {"kind": "weights", **FEW}},
    "refit, no alignment (solved)": {"method": "identity", "refit": True, "corrections": ()},
}  # fmt: skip
"""By the name of the row the settings of the merge."""


def learnt(world: World) -> str:
    own = world.scores(world.experts, "test")

    def made() -> Iterator[tuple[float, str]]:
        yield from refit_rows(world, own, ROWS)

    return table(world, made())


def main() -> None:
    """Train the base and the experts, and print the tables."""
    disable_progress_bar()
    set_verbosity_error()
    started = time.process_time()
    base = trained_base(SEEDS[0])
    experts = {task: trained_expert(task, base, 10 + i) for i, task in enumerate(TASKS)}
    world = World(experts, dict.fromkeys(TASKS, base))
    for count in (2, 4):
        typer.echo(f"### {'Two' if count == 2 else 'Four'} tasks\n\n{learnt(world.take(TASKS[:count]))}\n")
    typer.echo(
        f"Made by `python -m benchmarks.learnt` (sources {sources()}) on {machine()}: "
        f"{time.process_time() - started:.0f} CPU s. Seed of the base {SEEDS[0]}; {STEPS} steps; {CALIBRATION} "
        "unlabelled images of every task."
    )


if __name__ == "__main__":
    typer.run(main)
