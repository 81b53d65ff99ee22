"""How far a refit gets without any real data: what is made up is what the default merge reads.

    python -m benchmarks.no_data --zoo zoo --pair fashion-vit --pair fashion-resnet --pair text-llama

Images are noise, or drawn by `hf_zipit.draw_images`; texts are random tokens, or what the experts write from nothing
(`hf_zipit.write_samples`). Beside them stand the
merge without data, the real data, and the real data of the other tasks alone. Scores are of the validation split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils.logging import disable_progress_bar

import hf_zipit
from benchmarks.zoo import Pair, load

SEED = 0


def white(real: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels that know nothing of each other."""
    generator = torch.Generator().manual_seed(SEED)
    return {
        task: {"pixel_values": torch.randn(own["pixel_values"].shape, generator=generator)}
        for task, own in real.items()
    }


def made_up(pair: Pair, real: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What can be merged on, by a name; None for a merge without data."""
    yield "real data", real
    tasks = list(real)
    yield (
        "real data of the other task",
        {task: real[other] for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True)},
    )
    if "pixel_values" in real[tasks[0]]:
        pixels = real[tasks[0]]["pixel_values"]
        draw = partial(hf_zipit.draw_images, pair.experts, len(pixels), SEED, size=pixels.shape[-2:])
        yield "white noise", white(real)
        yield "noise with the spectrum of pictures", draw(steps=0)
        if any(isinstance(module, _BatchNorm) for module in pair.experts[tasks[0]].modules()):
            yield "the same, matched to batch norms", draw()
    else:
        ids = real[tasks[0]]["input_ids"]
        generator = torch.Generator().manual_seed(SEED)
        most = next(iter(pair.experts.values())).config.vocab_size
        drawn = {task: torch.randint(0, most, ids.shape, generator=generator) for task in tasks}
        yield "random tokens", {task: {"input_ids": own} for task, own in drawn.items()}
        yield "written by the experts", hf_zipit.write_samples(pair.experts, len(ids), ids.shape[1], seed=SEED)
    yield "none", None


def main(
    zoo: Annotated[Path, typer.Option(help="The folder of the zoo.")],
    pair: Annotated[list[str], typer.Option(help="Pairs of the zoo: images, or decoders.")],
    samples: Annotated[int, typer.Option(help="Of every task.")] = 512,
) -> None:
    """Measure some pairs."""
    disable_progress_bar()
    for name in pair:
        found = load(name, zoo)
        real = {task: found.calibration(task, samples, SEED) for task in found.experts}
        own = {task: found.score(expert, task, "validation") for task, expert in found.experts.items()}
        print(f"\n## {name}\n\n| merged on | {' | '.join(own)} | of experts |\n| --- |" + " ---: |" * (len(own) + 1))
        print(f"| experts | {' | '.join(f'{score:.3f}' for score in own.values())} | 100.0 % |", flush=True)
        for about, data in made_up(found, real):
            merged = hf_zipit.merge(found.experts, data, seed=SEED)
            scores = {task: found.score(partial(merged, task=task), task, "validation") for task in own}
            kept = sum(scores.values()) / sum(own.values())
            print(f"| {about} | {' | '.join(f'{score:.3f}' for score in scores.values())} | {kept:.1%} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
