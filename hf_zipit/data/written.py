"""Further calibration samples, of experts that write: what they go on with is like what they were trained on.

Few samples say little about what a layer sees elsewhere. A causal language model goes on from the first tokens of
samples that are there, or from any token where there are none (`write_samples`). An encoder-decoder answers to samples
that begin like one and end like another.

Ours. Calibration data that a language model writes itself is known from quantisation (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hf_zipit.data.calibration import Calibration, Inputs, size_of, without_labels
from hf_zipit.data.processes import placed
from hf_zipit.errors import DataError
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.hub.reasons import first_line
from hf_zipit.steady import steady

logger = logging.getLogger(__name__)

MASK, ANSWERS = "attention_mask", "decoder_input_ids"

BEGINNING = 4
"""So many tokens of a sample, at most, are gone on from."""

TOKENS = 2**16
"""So many are written for a task, at most: writing costs about what reading does."""

AT_ONCE = 64
"""Samples that are written side by side."""


@steady
def write_samples(experts: Experts, samples: int = 512, length: int = 128, seed: int = 0) -> dict[str, Inputs]:
    """Calibration data for `merge` that causal language models write from nothing: `input_ids` `[samples, length]`.

    Args:
        experts: the models by task name, as for `merge`.
        samples: of every task.
        length: of each, in tokens, or as many as the experts have positions, if that is fewer; about what they were
            trained on is best.
        seed: of what is drawn: the first token, all alike, and those that follow by what the expert says.

    Raises:
        DataError: an expert is no causal language model, or the numbers are too small.
        ExpertError: as `merge` does.
    """
    if samples < 1 or length < 2:
        raise DataError(f"Of {samples} samples of {length} tokens nothing can be written; ask for more.")
    found = {}
    for task, expert in load_experts(experts, least=1).items():
        if not writes(expert) or expert.config.is_encoder_decoder:
            raise DataError(
                f"The expert {task!r} ({type(expert).__name__}) writes nothing by itself; give calibration data."
            )
        length = min(length, getattr(expert.config, "max_position_embeddings", None) or length)
        draw = torch.Generator().manual_seed(seed)
        words = expert.get_input_embeddings().weight.shape[0]
        first = torch.randint(words, (samples, 1), generator=draw)
        asked = {expert.main_input_name: first, MASK: torch.ones_like(first)}
        with placed([expert], Accelerator().device), torch.no_grad():
            found[task] = {expert.main_input_name: _generated(expert, asked, length - 1, seed, ends=False)}
    return found


def with_written(calibration: Calibration, experts: Mapping[str, nn.Module], samples: int, seed: int) -> Calibration:
    """The calibration data, and behind it what the experts write, up to so many `samples` a task altogether.

    It is left as it is for experts that do not write, or read more than tokens, and for one collection for all tasks.
    All processes write the same.
    """
    more: dict[str | None, Inputs] = {}
    for task, found in calibration.counts.items():
        if found >= samples or task not in experts:
            continue
        expert, given = experts[task], without_labels(calibration.whole(task))
        if (count := written_count(expert, given, found, samples)) > 0:
            try:
                with placed([expert], calibration.device), torch.no_grad():
                    more[task] = _written(expert, given, count, seed)  # type: ignore[arg-type]
            except Exception as error:  # classes have their own ideas of how they write
                logger.warning("The expert %r writes no further samples: %s", task, first_line(error))
    return calibration.and_more(more) if more else calibration


def writes(expert: nn.Module) -> bool:
    """Whether a model has `generate`."""
    return isinstance(expert, PreTrainedModel) and expert.can_generate()


def written_count(expert: nn.Module, given: Mapping[str, Tensor], found: int, samples: int) -> int:
    """How many samples like the given ones an expert writes where `found` are there and so many `samples` wanted."""
    if not writes(expert):
        return 0
    tokens = {expert.main_input_name, *([ANSWERS] if expert.config.is_encoder_decoder else [])}
    if not tokens <= set(given) <= {*tokens, MASK}:
        return 0
    if any(x.dim() != 2 or x.is_floating_point() or x.shape[1] < 2 for x in given.values()):
        return 0
    return max(0, min(samples - found, TOKENS // sum(given[name].shape[1] for name in tokens)))


def _written(expert: PreTrainedModel, given: Inputs, count: int, seed: int) -> Inputs:
    """So many samples in the form of the given ones."""
    main = expert.main_input_name
    draw = torch.Generator().manual_seed(seed)
    if expert.config.is_encoder_decoder:
        found = _spliced(given, main, count, draw)
        length, start = given[ANSWERS].shape[1], int(given[ANSWERS][0, 0])
        asked = {name: tensor for name, tensor in found.items() if name != ANSWERS}
        answers = _generated(expert, asked, length - 1, seed, ends=True, start=start)
        found[ANSWERS] = _of_length(answers, length, _pad(expert)).to(given[ANSWERS])
        return found
    chosen = torch.randint(size_of(given), (count,), generator=draw)
    found = {name: tensor[chosen] for name, tensor in given.items()}
    real = _real(found, main)
    lengths = real.sum(1)
    beginning = max(1, min(BEGINNING, int(lengths.min()) - 1))
    first = found[main].gather(1, _places(real)[:, :beginning])
    asked = {main: first, MASK: torch.ones_like(first)}
    written = _generated(expert, asked, int(lengths.max()) - beginning, seed, ends=False)
    own = torch.arange(written.shape[1]) < lengths[:, None]
    found[main] = found[main].masked_scatter(real, written[own].to(found[main]))  # row by row, both
    return found


def _real(inputs: Inputs, main: str) -> Tensor:
    """Which tokens fill nothing up, `[samples, length]`."""
    return inputs[MASK].bool() if MASK in inputs else torch.ones_like(inputs[main], dtype=torch.bool)


def _places(real: Tensor) -> Tensor:
    """Where the real tokens of every sample are, those first, `[samples, length]`; whichever side is filled up."""
    return (~real).to(torch.uint8).argsort(dim=1, stable=True)


def _spliced(given: Inputs, main: str, count: int, draw: torch.Generator) -> Inputs:
    """Samples that begin like one and, from a random share of its length on, go on like another."""
    first, second = (torch.randint(size_of(given), (count,), generator=draw) for _ in range(2))
    tokens = given[main]
    real = _real(given, main)
    share = torch.rand(count, generator=draw)
    begin, skipped = ((share * real[of].sum(1)).long()[:, None] for of in (first, second))
    at = torch.arange(tokens.shape[1]).expand(count, -1)
    packed = tokens.gather(1, _places(real))
    from_second = packed[second].gather(1, (at - begin + skipped).clamp(0, tokens.shape[1] - 1))
    spliced = torch.where(at < begin, packed[first], from_second)
    length = (begin + real[second].sum(1, keepdim=True) - skipped).clamp(1, tokens.shape[1])
    left = MASK in given and not bool(real[:, 0].all())
    own = at >= tokens.shape[1] - length if left else at < length
    fill = tokens[~real][0] if not bool(real.all()) else tokens.new_zeros(())
    found = {main: fill.expand(count, tokens.shape[1]).masked_scatter(own, spliced[at < length])}
    return {name: own.to(given[name]) if name == MASK else found.get(name, given[name][:count]) for name in given}


def _generated(
    expert: PreTrainedModel, asked: Inputs, tokens: int, seed: int, *, ends: bool, start: int | None = None
) -> Tensor:
    """What the expert writes, drawn from what it says, on the CPU, with what it went on from; on its device.

    `ends`: whether it may end before. `start`: what answers of an encoder-decoder start with.
    """
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=tokens,
        min_new_tokens=None if ends else tokens,
        pad_token_id=_pad(expert),
        decoder_start_token_id=start,
    )
    torch.manual_seed(seed)  # a merge leaves the random state as it was
    parts = []
    for first in range(0, size_of(asked), AT_ONCE):
        part = {name: tensor[first : first + AT_ONCE].to(expert.device) for name, tensor in asked.items()}
        parts.append(expert.generate(**part, generation_config=settings).cpu())
    length = max(part.shape[1] for part in parts)
    return torch.cat([_of_length(part, length, _pad(expert)) for part in parts])


def _pad(expert: PreTrainedModel) -> int:
    pad = getattr(expert.config, "pad_token_id", None)
    return 0 if pad is None else pad


def _of_length(tokens: Tensor, length: int, fill: int) -> Tensor:
    """Filled up behind, or cut."""
    return nn.functional.pad(tokens[:, :length], (0, max(0, length - tokens.shape[1])), value=fill)
