"""How far a refit gets without any real data: what is made up is what the default merge reads.

    python -m benchmarks.no_data --zoo zoo --pair fashion-vit --pair fashion-resnet --pair text-llama

Images are noise, or what batch norms remember of them (DeepInversion, arXiv 1912.08795, without its other terms);
texts are random tokens, or what the experts write from nothing (`hf_zipit.write_samples`). Beside them stand the
merge without data, the real data, and the real data of the other tasks alone. Scores are of the validation split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hf_zipit
from benchmarks.zoo import Pair, load

SEED = 0
STEPS, RATE, AT_ONCE = 200, 0.05, 64
"""Of the images that match batch norms: steps of Adam, their size, and how many are matched together."""


def white(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Pixels that know nothing of each other."""
    return torch.randn(shape, generator=generator)


def pink(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise whose amplitudes fall with the frequency, as those of pictures do."""
    height, width = shape[-2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    images = torch.fft.irfft2(torch.fft.rfft2(white(shape, generator)) / frequency, s=(height, width))
    return (images - images.mean()) / images.std()


def matched(expert: PreTrainedModel, images: Tensor) -> Tensor:
    """Images that give an expert's batch norms the means and variances that they remember."""
    norms = [module for module in expert.modules() if isinstance(module, _BatchNorm)]
    found = []
    for part in images.split(AT_ONCE):
        part = part.clone().requires_grad_()
        optimizer = torch.optim.Adam([part], lr=RATE)
        for _ in range(STEPS):
            off: list[Tensor] = []
            hooks = [norm.register_forward_pre_hook(partial(_compare, off)) for norm in norms]
            expert(pixel_values=part)
            for hook in hooks:
                hook.remove()
            optimizer.zero_grad()
            torch.stack(off).sum().backward()
            optimizer.step()
        found.append(part.detach())
    return torch.cat(found)


def _compare(off: list[Tensor], norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    mean, variance = args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), correction=0)
    scale = norm.running_var + 1e-5
    off.append(
        ((mean - norm.running_mean).square() / scale + (variance / scale).clamp_min(1e-6).log().square()).mean()
    )


def images(pair: Pair, real: Mapping[str, Any], draw: Callable[..., Tensor], by_norms: bool) -> dict[str, Tensor]:
    """Made-up images of every task."""
    found = {}
    for seed, (task, expert) in enumerate(pair.experts.items()):
        shape = tuple(real[task]["pixel_values"].shape)
        found[task] = draw(shape, torch.Generator().manual_seed(SEED + seed))
        if by_norms:
            found[task] = matched(expert, found[task])
    return {task: {"pixel_values": pixels} for task, pixels in found.items()}


def made_up(pair: Pair, real: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What can be merged on, by a name; None for a merge without data."""
    yield "real data", real
    tasks = list(real)
    yield (
        "real data of the other task",
        {task: real[other] for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True)},
    )
    if "pixel_values" in real[tasks[0]]:
        yield "white noise", images(pair, real, white, False)
        yield "noise with the spectrum of pictures", images(pair, real, pink, False)
        if any(isinstance(module, _BatchNorm) for module in pair.experts[tasks[0]].modules()):
            yield "images that match batch norms", images(pair, real, pink, True)
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
