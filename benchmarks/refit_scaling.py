"""How the refit's cost grows with samples and with depth, beside the experts' forward passes over the same data.

    python -m benchmarks.refit_scaling --zoo zoo [--pair fashion-vit] [--samples 64 --samples 256] [--repeats 3]

The forward passes are those that the targets need: every expert on the samples of all tasks, in the refit's own
micro-batches. Both are timed in turn in one run, in seconds of CPU over all threads, which say more than the clock
on a busy machine; the best of the repeats counts. The refit is the whole stage. What a class does with samples of one
shape is traced once in a process and remembered; the first refit, which has to trace it, has a column of its own.

Linear growth is shown by the best line through the measurements and the largest share by which one of them is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.zoo import RECIPES, Pair, load
from hf_zipit.align.stage import align_trunk
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.data.calibration import Calibration, MicroBatch
from hf_zipit.merging import plan
from hf_zipit.refit.program import FORWARD_PASSES
from hf_zipit.refit.stage import refit_trunk
from hf_zipit.report.tables import new_table

SAMPLES = (64, 128, 256, 512, 1024)
AT_SAMPLES, AT_DEPTH = 512, 1.0  # where the other one varies


@dataclass(frozen=True)
class Point:
    """One measurement: samples per task, the merged share of the blocks, and seconds of CPU.

    Of two refits: the `first` one of a process, and any later one of the same class.
    """

    samples: int
    depth: float
    forward: float
    first: float
    refit: float


def measure(pair: Pair, samples: int, depth: float, repeats: int) -> Point:
    """The best of the repeats, forward passes and refit in turn."""
    planned = plan(pair.experts, method="identity", depth=depth, refit=True)
    data = {task: pair.calibration(task, samples) for task in pair.experts}
    calibration = Calibration(data, processor=pair.tokenizer).read(pair.experts)
    alignment = align_trunk(planned)
    trunk = combine_trunk(planned, alignment)
    batches = calibration.micro_batches(planned.config.refit.micro_batch)

    def forward() -> float:
        return seconds(lambda: run_experts(list(pair.experts.values()), batches))

    def fitted() -> float:
        return seconds(lambda: refit_trunk(planned, trunk, alignment, calibration))

    def first() -> float:
        FORWARD_PASSES.clear()
        return fitted()

    best = np.min([(forward(), first(), fitted()) for _ in range(repeats)], axis=0)
    return Point(samples, depth, *map(float, best))


@torch.inference_mode()
def run_experts(experts: Sequence[PreTrainedModel], batches: Sequence[MicroBatch]) -> None:
    """Every expert on all micro-batches."""
    for expert in experts:
        for batch in batches:
            expert(**batch.inputs)


def seconds(function: Callable[[], Any]) -> float:
    """Of CPU, over all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope and intercept of the least-squares line, and the largest distance from it as a share of the value."""
    slope, intercept = np.polyfit(x, y, 1)
    off = np.abs(slope * np.asarray(x) + intercept - y) / np.abs(y)
    return float(slope), float(intercept), float(off.max())


def report(points: Sequence[Point], over: str, console: Console) -> None:
    """The points as a table, and how well a line fits them."""
    columns = ["samples per task", "depth", "forward [s]", "refit [s]", "ratio", "first refit [s]", "ratio"]
    table = new_table(f"refit over {over}", [], columns)
    for p in points:
        times = (cell for spent in (p.refit, p.first) for cell in (f"{spent:.2f}", f"{spent / p.forward:.1f}"))
        table.add_row(str(p.samples), f"{p.depth:.2f}", f"{p.forward:.2f}", *times)
    console.print(table)
    if len(points) > 2:  # a line always fits two
        slope, fixed, off = line([getattr(p, over) for p in points], [p.refit for p in points])
        console.print(f"refit = {fixed:.2f} s + {slope:.4g} s x {over}; at most {off:.0%} off\n")


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the trained zoo.")],
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "fashion-vit",
    samples: Annotated[list[int] | None, typer.Option(help="Samples per task; may be repeated.")] = None,
    depths: Annotated[list[float] | None, typer.Option(help="Shares of the blocks; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Time the refit of a pair over samples and depth."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    loaded = load(pair, zoo, train=False)
    depths = depths or [block / 6 for block in range(1, 7)]
    measure(loaded, 16, AT_DEPTH, 1)  # what is imported at first use is not counted
    console = Console()
    console.print(f"{pair}, {threads} thread{'s' * (threads != 1)}, seconds of CPU, best of {repeats}\n")
    by_samples = [measure(loaded, count, AT_DEPTH, repeats) for count in samples or SAMPLES]
    report(by_samples, "samples", console)
    report([measure(loaded, AT_SAMPLES, depth, repeats) for depth in depths], "depth", console)


if __name__ == "__main__":
    typer.run(main)
