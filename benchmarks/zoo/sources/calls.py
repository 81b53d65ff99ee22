"""Calls: ten digits as sounds of a voice, in two codes, at 4 kHz.

In the code `"tones"` a digit is a note, with overtones, so many whole tones above the voice's key; in `"chirps"` it is
where a whistle starts and ends above the key. The key differs from call to call, so that a sound alone says nothing:
every call begins with the key itself. Generated, so that nothing has to be installed.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

RATE, LENGTH = 4000, 4000  # samples a second, and of a call
SOUNDS = 8  # of a call, the key first
KEY = (200.0, 400.0)  # Hz
OVERTONES = (1.0, 0.6, 0.4, 0.2)  # amplitudes
STEPS = ((0, 6), (0, 12), (0, 18), (6, 0), (6, 12), (6, 18), (12, 0), (12, 6), (18, 6), (18, 0))  # chirps, half tones
NOISE = 0.1  # standard deviation of every sample; a sound's amplitude is near 1
CODES = ("tones", "chirps")
DIGITS = tuple("0123456789")


def calls(code: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The calls `[count, LENGTH]` and what is said at every sample, 0 to 9, or -100 at the key, of the same shape."""
    digits = torch.randint(len(DIGITS), (count, SOUNDS), generator=generator)
    lengths = 1 + torch.rand(count, SOUNDS, generator=generator)
    ends = (lengths.cumsum(1) / lengths.sum(1, keepdim=True) * LENGTH).round()
    place = torch.arange(LENGTH).expand(count, -1).contiguous()
    sound = torch.searchsorted(ends, place.float(), right=True).clamp(max=SOUNDS - 1)
    begins = torch.cat([torch.zeros(count, 1), ends[:, :-1]], 1)
    within = (place - begins.gather(1, sound)) / (ends - begins).gather(1, sound)  # 0 to 1 during every sound
    if code == "tones":
        low = high = 2.0 * digits
        partials = OVERTONES
    else:
        low, high = torch.tensor(STEPS, dtype=torch.float)[digits].unbind(2)
        partials = OVERTONES[:1]
    low, high = (torch.cat([torch.zeros(count, 1), steps[:, 1:]], 1).gather(1, sound) for steps in (low, high))
    key = KEY[0] * (KEY[1] / KEY[0]) ** torch.rand(count, 1, generator=generator)
    frequency = key * 2 ** ((low + (high - low) * within) / 12)
    phase = 2 * torch.pi * (frequency / RATE).cumsum(1)
    wave = sum(size * (phase * (k + 1)).sin() * (frequency * (k + 1) < RATE / 2) for k, size in enumerate(partials))
    loud = (torch.pi * within).sin() ** 0.5 * (0.7 + 0.6 * torch.rand(count, 1, generator=generator))
    heard = wave * loud + NOISE * torch.randn(count, LENGTH, generator=generator)
    return heard, digits.gather(1, sound).masked_fill(sound == 0, -100)
