"""Further calibration samples, spliced of given ones: each begins like one and goes on like another.

Few samples say little about what a layer sees elsewhere. In a splice all positions but those at the seam hold what
they may hold, beside what may stand there, in a context that no given sample has. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Generator, Tensor

from hf_zipit.data.calibration import Inputs, size_of

MASK, DECODER = "attention_mask", "decoder_"

ANSWERS = "decoder_input_ids"


def can_be_spliced(given: Mapping[str, Tensor], main: str) -> bool:
    """Whether all inputs have something for every position of a text or a recording, which is what `main` holds.

    Not of images and videos, whose positions have more than one axis, nor of texts with images, which do not line up.
    """
    return _axes(given, main) is not None


def spliced(given: Inputs, main: str, count: int, draw: Generator, size: int) -> Iterator[Callable[[], Inputs]]:
    """What makes so many samples, `size` at a time: they begin like one of the given and, from a random share of its
    length on, go on like another. A decoder's inputs follow the same two, from the same share on.

    They are filled up on the side where the given are. These `can_be_spliced`.
    """
    first, second = (torch.randint(size_of(given), (count,), generator=draw) for _ in range(2))
    share = torch.rand(count, generator=draw)
    for rows in zip(first.split(size), second.split(size), share.split(size), strict=True):
        yield partial(_spliced, given, main, *rows)


def real_tokens(inputs: Mapping[str, Tensor], name: str, axis: int = 1) -> Tensor:
    """Which positions of an input fill nothing up, `[samples, length]`."""
    mask = inputs.get(_mask_of(name))
    size, length = inputs[name].shape[0], inputs[name].shape[axis]
    return torch.ones(size, length, dtype=torch.bool) if mask is None else mask > 0


def real_places(real: Tensor) -> Tensor:
    """Where the real positions of every sample are, those first, `[samples, length]`; whichever side is filled up."""
    return (~real).to(torch.uint8).argsort(dim=1, stable=True)


def _mask_of(name: str) -> str:
    return DECODER + MASK if name.startswith(DECODER) else MASK


def _lead(name: str, main: str) -> str:
    """The input whose positions are an input's."""
    return ANSWERS if name.startswith(DECODER) else main


def _axes(given: Mapping[str, Tensor], main: str) -> dict[str, int] | None:
    """Along which axis every input has its positions; None where one has none, or none that line up with `main`'s."""
    leads = {name: _lead(name, main) for name in given}
    if not {main, *leads.values()} <= set(given) or any(not 2 <= x.dim() <= 3 for x in given.values()):
        return None
    found = {}
    for name, tensor in given.items():
        length = _length(given, leads[name])
        axes = [axis for axis in range(1, tensor.dim()) if tensor.shape[axis] == length]
        if length < 2 or len(axes) != 1 or (name == _mask_of(name) and tensor.dim() > 2):
            return None
        found[name] = axes[0]
    return found


def _length(given: Mapping[str, Tensor], lead: str) -> int:
    """How many positions there are: as the mask says, or the longer axis of several, which is time beside features."""
    mask = given.get(_mask_of(lead))
    return max(given[lead].shape[1:] if mask is None else mask.shape[1:])


def _spliced(given: Inputs, main: str, first: Tensor, second: Tensor, share: Tensor) -> Inputs:
    axes = _axes(given, main) or {}
    leads = {name: _lead(name, main) for name in given}
    sources = {
        lead: _sources(real_tokens(given, lead, axes[lead]), first, second, share) for lead in set(leads.values())
    }
    found = {}
    for name, tensor in given.items():
        row, column = sources[leads[name]]
        found[name] = tensor.movedim(axes[name], 1)[row, column].movedim(1, axes[name]).contiguous()
    return found


def _sources(real: Tensor, first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """From which sample and which of its places every place of the splices comes, `[splices, length]` each."""
    lengths, places = real.sum(1), real_places(real)
    begin, skipped = ((share * lengths[of]).long()[:, None] for of in (first, second))
    own_length = begin + lengths[second][:, None] - skipped
    at = torch.arange(real.shape[1]).expand(len(share), -1)
    if not bool(real[:, 0].all()):  # filled up before
        at = at - (real.shape[1] - own_length)
    row = torch.where(at < begin, first[:, None], second[:, None])
    column = places[row, torch.where(at < begin, at, at - begin + skipped).clamp(0, real.shape[1] - 1)]
    if bool(real.all()):
        return row, column
    own = (at >= 0) & (at < own_length)
    fill_row, fill_column = (~real).nonzero()[0]
    return torch.where(own, row, fill_row), torch.where(own, column, fill_column)
