"""Further calibration samples. Of experts that write: what they go on with is like what they were trained on.

Few samples say little about what a layer sees elsewhere. A causal language model goes on from the first token of
samples that are there, or from any token where there are none (`write_samples`). An encoder-decoder answers to spliced
samples. Those of other experts are spliced alone (`spliced.py`).

Ours. Calibration data that a language model writes itself is known from quantisation (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hf_zipit.data.calibration import Calibration, Inputs, pieces, size_of, without_labels
from hf_zipit.data.inputs import ModelInputs
from hf_zipit.data.processes import placed
from hf_zipit.data.spliced import ANSWERS, MASK, can_be_spliced, real_places, real_tokens, spliced
from hf_zipit.errors import DataError
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.hub.reasons import first_line
from hf_zipit.steady import steady

logger = logging.getLogger(__name__)

TOKENS = 2**16
"""So many are written for a task, at most. Of short texts there are as many as hold so many tokens,"""

SPAN = 4
"""at most so many times the wanted number, and long texts hold no more than so many times these tokens,"""

NUMBERS = 2**26
"""recordings no more than so many numbers."""

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


def with_more(
    calibration: Calibration, experts: Mapping[str, nn.Module], samples: int, seed: int
) -> tuple[Calibration, dict[str, int], dict[str, int]]:
    """The calibration data, and behind it further samples, where a task has fewer than `samples`; and by task how many
    of them its expert wrote, and how many are spliced.

    It is left as it is for inputs that cannot be spliced and for one collection for all tasks. All processes make the
    same.
    """
    more: dict[str | None, list[Callable[[], Inputs]]] = {}
    written, of_given = {}, {}
    for task, found in calibration.counts.items():
        if task is None or found >= samples:
            continue
        expert, given = experts[task], without_labels(calibration.whole(task))
        count, size = further_count(expert, given, found, samples), calibration.batch_size
        draw, parts = torch.Generator().manual_seed(seed), []
        if (own := min(count, written_count(expert, given))) > 0:
            try:
                with placed([expert], calibration.device), torch.no_grad():
                    texts = _written(expert, given, own, seed, draw)  # type: ignore[arg-type]
                parts += [partial(dict, piece) for piece in pieces(texts, size)]
                written[task] = own
            except Exception as error:  # classes have their own ideas of how they write
                logger.warning("The expert %r writes no further samples: %s", task, first_line(error))
        if (rest := count - written.get(task, 0)) > 0:
            parts += spliced(given, ModelInputs.of(expert).main, rest, draw, size)
            of_given[task] = rest
        more[task] = parts
    return calibration.and_more(more) if written or of_given else calibration, written, of_given


def writes(expert: nn.Module) -> bool:
    """Whether a model has `generate`."""
    return isinstance(expert, PreTrainedModel) and expert.can_generate()


def written_count(expert: nn.Module, given: Mapping[str, Tensor]) -> int:
    """How many samples like the given ones an expert writes at most: one that writes tokens, from tokens alone."""
    if not writes(expert):
        return 0
    tokens = {expert.main_input_name, *([ANSWERS] if expert.config.is_encoder_decoder else [])}
    if not tokens <= set(given) <= {*tokens, MASK} or any(x.is_floating_point() for x in given.values()):
        return 0
    return TOKENS // sum(given[name].shape[1] for name in tokens)


def further_count(expert: nn.Module, given: Mapping[str, Tensor], found: int, samples: int) -> int:
    """How many samples are added to the `found` given ones where there are to be as many `samples`."""
    main = ModelInputs.of(expert).main
    if found >= samples or not can_be_spliced(given, main):
        return 0
    if given[main].is_floating_point():
        samples = min(samples, NUMBERS // given[main][0].numel())
    else:
        tokens = sum(given[name].shape[1] for name in {main, ANSWERS} & set(given))
        samples = min(max(samples, TOKENS // tokens), SPAN * samples, SPAN * TOKENS // tokens)
    return max(0, samples - found)


def _written(expert: PreTrainedModel, given: Inputs, count: int, seed: int, draw: torch.Generator) -> Inputs:
    """So many samples in the form of the given ones."""
    main = expert.main_input_name
    if expert.config.is_encoder_decoder:
        found = next(spliced(given, main, count, draw, count))()
        length, start = given[ANSWERS].shape[1], int(given[ANSWERS][0, 0])
        asked = {name: tensor for name, tensor in found.items() if name != ANSWERS}
        answers = _generated(expert, asked, length - 1, seed, ends=True, start=start)
        return {**found, ANSWERS: _of_length(answers, length, _pad(expert)).to(given[ANSWERS])}
    chosen = torch.randint(size_of(given), (count,), generator=draw)
    found = {name: tensor[chosen] for name, tensor in given.items()}
    real = real_tokens(found, main)
    lengths = real.sum(1)
    first = found[main].gather(1, real_places(real)[:, :1])
    asked = {main: first, MASK: torch.ones_like(first)}
    written = _generated(expert, asked, int(lengths.max()) - 1, seed, ends=False)
    own = torch.arange(written.shape[1]) < lengths[:, None]
    found[main] = found[main].masked_scatter(real, written[own].to(found[main]))  # row by row, both
    return found


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
