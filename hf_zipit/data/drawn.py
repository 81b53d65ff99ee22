"""Calibration images from nothing: noise with the spectrum of pictures, and what batch norms remember of real ones.

A refit needs inputs that bring every unit to where it works, not pictures of anything. The amplitudes of photographs
fall with the frequency (Field, J. Opt. Soc. Am. A 4, 1987), those of bare shapes faster, and so do those of this
noise, image by image in another way. Where an expert has batch norms, the noise is changed until their inputs have the
means and variances that they remember: DeepInversion (arXiv 1912.08795) without its classes, priors and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_zipit.adapters import example_inputs
from hf_zipit.data.calibration import Inputs
from hf_zipit.data.processes import placed
from hf_zipit.errors import DataError
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.steady import steady

IMAGES = "pixel_values"

ALIKE = 0.9
"""The share of the variance that all colours of a picture have in common."""

SLOPES = (0.75, 2.25)
"""Amplitudes fall with the frequency to powers between these, evenly spread over the images: about 1 in photographs,
2 in bare shapes."""

AT_ONCE, RATE = 64, 0.05
"""So many images are matched to batch norms together, by steps of Adam of this size."""


@steady
def draw_images(
    experts: Experts, samples: int = 512, seed: int = 0, *, size: int | Sequence[int] | None = None, steps: int = 200
) -> dict[str, Inputs]:
    """Calibration data for `merge` of image models, from nothing: `pixel_values` `[samples, channels, height, width]`.

    Real images are better: see `docs/refit.md` for how much.

    Args:
        experts: the models by task name, as for `merge`.
        samples: of every task.
        seed: of the noise.
        size: height and width in pixels; by default what the experts' configuration says.
        steps: of Adam, where experts have batch norms; each costs about three forward passes of all samples.

    Raises:
        DataError: an expert reads more or other than images, does not say their size, or the numbers are too small.
        ExpertError: as `merge` does.
    """
    if samples < 1 or steps < 0:
        raise DataError(f"samples is {samples} and steps {steps}; they must be at least 1 and 0.")
    found = {}
    for number, (task, expert) in enumerate(load_experts(experts, least=1).items()):
        generator = torch.Generator().manual_seed(seed + number)
        pixels = noise((samples, *shape_of(expert, task, size)), generator)
        if steps and any(isinstance(module, _BatchNorm) for module in expert.modules()):
            with placed([expert], Accelerator().device):
                pixels = matched(expert, pixels, steps)
        found[task] = {IMAGES: pixels}
    return found


def shape_of(expert: nn.Module, task: str, size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """Channels, height and width of what an expert reads."""
    inputs = example_inputs(expert)
    if set(inputs) != {IMAGES} or inputs[IMAGES].dim() != 4:
        raise DataError(
            f"The expert {task!r} is a {type(expert).__name__}, which reads {sorted(inputs)} and not images alone; "
            "give calibration data."
        )
    if size is None and getattr(expert.config, "image_size", None) is None:
        raise DataError(
            f"The configuration of the expert {task!r} ({type(expert).__name__}) does not say how large its images "
            "are; give size=, in pixels."
        )
    channels, height, width = inputs[IMAGES].shape[1:]
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Images whose amplitudes fall with the frequency, `[samples, channels, height, width]`.

    Those of every slope have mean 0 and variance 1 together with their like; single ones are brighter or darker.
    """
    samples, channels, height, width = shape
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    slopes = torch.linspace(*SLOPES, samples)[torch.randperm(samples, generator=generator)]
    amplitudes = frequency ** -slopes[:, None, None]
    white = torch.randn((samples, channels + 1, height, width), generator=generator)
    found = torch.fft.irfft2(torch.fft.rfft2(white) * amplitudes[:, None], s=(height, width))
    found = found / energy(amplitudes, width)[:, None, None, None].sqrt()
    return ALIKE**0.5 * found[:, :1] + (1 - ALIKE) ** 0.5 * found[:, 1:]


def energy(amplitudes: Tensor, width: int) -> Tensor:
    """The variance of the noise with some amplitudes `[..., height, width / 2 + 1]`, those of the other half alike."""
    twice = torch.full((amplitudes.shape[-1],), 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (amplitudes.square() * twice).sum((-2, -1)) / (amplitudes.shape[-2] * width)


def matched(expert: nn.Module, pixels: Tensor, steps: int) -> Tensor:
    """Images like some others with which an expert's batch norms see the means and variances that they remember."""
    norms = [
        module for module in expert.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    device, found = next(expert.parameters()).device, []
    needed = [parameter for parameter in expert.parameters() if parameter.requires_grad]
    expert.requires_grad_(False)
    off: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(partial(_note, off)) for norm in norms]
    try:
        for part in pixels.split(AT_ONCE):
            own = part.to(device).requires_grad_()
            optimizer = torch.optim.Adam([own], lr=RATE)
            for _ in range(steps):
                off.clear()
                with torch.enable_grad():
                    expert(**{IMAGES: own})
                    torch.stack(off).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(own.detach().cpu())
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in needed:
            parameter.requires_grad_(True)
    return torch.cat(found)


def _note(off: list[Tensor], norm: _BatchNorm, args: tuple[Any, ...]) -> None:
    """How far a batch norm's input is from what it remembers, in its own deviations, and in the logarithm of them."""
    x = args[0].movedim(1, 0).flatten(1)
    remembered = norm.running_var + norm.eps
    means = (x.mean(1) - norm.running_mean).square() / remembered
    spreads = ((x.var(1, correction=0) + norm.eps) / remembered).log().square()
    off.append((means + spreads).mean())
