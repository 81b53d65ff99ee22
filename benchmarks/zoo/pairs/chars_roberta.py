"""`chars-roberta` and its kind: masked characters in fixed columns, by narrow models. Hard pairs.

Expert a reads timetables, expert b tables of inflected verbs, two lines of 64 characters a sample. What is hidden can
be found elsewhere in the same line, at a distance that depends on the column: the heads (8 of 16) attend to exact
places, which the position embeddings of 128 places have to tell apart within 128 dimensions. Either expert is nearly
right on its own source and lost on the other. Blanks are never hidden: the columns give them away.

In `chars-mixed` every line of expert a is a timetable's or a number in several notations, every line of expert b a
verb's forms or its ciphers, and the width is half. Both need all that they have, and little is left for the other.

`chars-deberta` and `chars-albert` read what chars-roberta does, half as much of it: one tells where things are by
relative positions, which the queries' and keys' own maps read, the other runs one layer four times.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
)

from benchmarks.zoo.characters import character_tokenizer, encode_fixed
from benchmarks.zoo.masking import hide, shown
from benchmarks.zoo.pair import IGNORED, Metric, Splits, Tensors
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import ciphers, inflections, numerals, timetable

LINES = 2  # a sample
LENGTH = LINES * timetable.WIDTH
SAMPLES = {"train": 32_000, "validation": 1000, "test": 1000}
HELD_OUT = 1000  # lines that only validation has, and as many for test
MASKED = 0.15  # of the characters that are not blank
SPECIALS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


class CharsRoberta(Recipe):
    name = "chars-roberta"
    about = "RoBERTa (post-LN, narrow), masked characters of timetables and of inflected verbs"
    model_class = RobertaForMaskedLM
    schedule = Schedule(epochs=1, batch_size=32, learning_rate=2e-3, weight_decay=0.01)
    seeds: Mapping[str, int] = {"a": 71, "b": 72}
    width, heads = 128, 8
    mixed = False
    samples = SAMPLES

    def train_tokenizer(self) -> PreTrainedTokenizerBase:
        return character_tokenizer(timetable.ALPHABET, LENGTH, SPECIALS)

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        return {
            task: {
                split: hidden(
                    encode_fixed(tokenizer, _samples(task, split, self.mixed)[:count]),
                    tokenizer,
                    Generator().manual_seed(0),
                )
                for split, count in self.samples.items()
            }
            for task in self.seeds
        }

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return RobertaForMaskedLM(
            RobertaConfig(
                **self._sizes(tokenizer, LENGTH + tokenizer.pad_token_id + 1),  # they start behind the padding's
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    def _sizes(self, tokenizer: PreTrainedTokenizerBase, positions: int = LENGTH) -> dict[str, int | float]:
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.width,
            "num_hidden_layers": 4,
            "num_attention_heads": self.heads,
            "intermediate_size": 2 * self.width,
            "max_position_embeddings": positions,
            "type_vocab_size": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def metric(self, tokenizer: PreTrainedTokenizerBase) -> Metric:
        return Metric("masked-character accuracy")

    def augment(self, batch: Tensors, tokenizer: PreTrainedTokenizerBase, generator: Generator) -> Tensors:
        return hidden(shown(batch), tokenizer, generator)

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        asked = batch["labels"] != IGNORED
        features = model.base_model(batch["input_ids"]).last_hidden_state
        return cross_entropy(model.lm_head(features[asked]), batch["labels"][asked])


def hidden(text: Tensor, tokenizer: PreTrainedTokenizerBase, generator: Generator) -> Tensors:
    """Texts `[texts, length]` with a share of what is not blank hidden."""
    return hide(text, text != tokenizer.convert_tokens_to_ids(" "), MASKED, tokenizer.mask_token_id, generator)


class CharsMixed(CharsRoberta):
    name = "chars-mixed"
    about = "RoBERTa (post-LN, half as wide), masked characters of times and numbers and of verbs' forms and ciphers"
    schedule = Schedule(epochs=1, batch_size=32, learning_rate=3e-3, weight_decay=0.01)
    seeds: Mapping[str, int] = {"a": 75, "b": 76}
    width, heads = 64, 4
    mixed = True


class CharsDeberta(CharsRoberta):
    name = "chars-deberta"
    about = (
        "DeBERTa-v2 (relative positions by the maps of words), masked characters of timetables and of inflected verbs"
    )
    model_class = DebertaV2ForMaskedLM
    schedule = Schedule(epochs=1, batch_size=32, learning_rate=3e-3, weight_decay=0.01)
    seeds: Mapping[str, int] = {"a": 77, "b": 78}
    samples = {**SAMPLES, "train": 16_000}

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return DebertaV2ForMaskedLM(
            DebertaV2Config(
                **self._sizes(tokenizer),
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_biased_input=False,
                position_buckets=64,
                max_relative_positions=-1,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
            )
        )

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        asked = batch["labels"] != IGNORED
        return cross_entropy(model(batch["input_ids"]).logits[asked], batch["labels"][asked])


class CharsAlbert(CharsDeberta):
    name = "chars-albert"
    about = "ALBERT (post-LN, one layer four times), masked characters of timetables and of inflected verbs"
    model_class = AlbertForMaskedLM
    seeds: Mapping[str, int] = {"a": 79, "b": 80}

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        own = {"embedding_size": self.width // 2, "classifier_dropout_prob": 0.0}
        return AlbertForMaskedLM(AlbertConfig(**self._sizes(tokenizer), **own))


@cache
def _samples(task: str, split: str, mixed: bool) -> tuple[str, ...]:
    """A split's texts; every split has its own seed, and validation and test their own verbs.

    `mixed`: every line is drawn from the task's first or second source.
    """
    generator, count = Generator().manual_seed(list(SAMPLES).index(split)), LINES * SAMPLES[split]
    if task == "a":
        lines = timetable.lines(count, generator)
        others = numerals.lines(count, generator) if mixed else lines
    else:
        verbs = inflections.lines()
        known = split_indices(len(verbs), HELD_OUT, HELD_OUT, seed=0)[split]
        drawn = known[torch.randint(len(known), (count,), generator=generator)].tolist()
        lines = [verbs[i] for i in drawn]
        encoded = ciphers.lines()
        others = [encoded[i] for i in drawn] if mixed else lines
    if mixed:
        second = torch.rand(count, generator=generator) < 0.5
        lines = [other if is_other else line for line, other, is_other in zip(lines, others, second, strict=True)]
    return tuple(map("".join, zip(*[iter(lines)] * LINES, strict=True)))
