"""`glosses-roberta-mlm` and `glosses-prelayernorm-mlm`: masked-word models on two text sources, post-LN and pre-LN.

Expert a reads definitions of nouns, expert b glosses of verbs, adjectives and adverbs with their example sentences;
one tokenizer serves both. Every split is masked once and for all: the labels are the hidden words. Training draws a
new mask for every batch, which it can because `input_ids` and `labels` together hold the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from benchmarks.zoo.pair import IGNORED, Metric, Splits, Tensors, rows
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import wordnet
from benchmarks.zoo.wordpiece import encode, train_wordpiece

TASKS = ("a", "b")
TEXTS = 34_000  # of each source
VALIDATION = TEST = 2000
VOCABULARY = 2048
LENGTH = 32
MASKED = 0.15
SPECIALS = {  # in RoBERTa's order, so that the ids are the ones its configuration expects
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
_SPECIAL_IDS = 5


class GlossesMaskedWords(Recipe):
    """What both pairs share; they differ in where the norms stand."""

    config_class: type[RobertaConfig] | type[RobertaPreLayerNormConfig]

    def train_tokenizer(self) -> PreTrainedTokenizerBase:
        texts = [texts[i] for texts, parts in map(_texts, TASKS) for i in parts["train"].tolist()]
        return train_wordpiece(texts, VOCABULARY, LENGTH, SPECIALS)

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        found: Splits = {}
        for task in TASKS:
            texts, parts = _texts(task)
            encoded = encode(tokenizer, texts)
            masked = hide(encoded["input_ids"], tokenizer.mask_token_id, Generator().manual_seed(0))
            data = encoded | masked
            found[task] = {split: rows(data, index) for split, index in parts.items()}
        return found

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        config = self.config_class(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=LENGTH + tokenizer.pad_token_id + 1,  # positions start behind the padding's
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return self.model_class(config)

    def metric(self, tokenizer: PreTrainedTokenizerBase) -> Metric:
        return Metric("masked-word accuracy")

    def augment(self, batch: Tensors, generator: Generator) -> Tensors:
        text = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
        return batch | hide(text, _mask_id(), generator)


class GlossesRoberta(GlossesMaskedWords):
    name = "glosses-roberta-mlm"
    about = "RoBERTa (post-LN), masked words of noun glosses | verb and adjective glosses with examples"
    model_class = RobertaForMaskedLM
    config_class = RobertaConfig
    schedule = Schedule(epochs=6, batch_size=64, learning_rate=1.5e-3, weight_decay=0.01)
    seeds = {"a": 41, "b": 42}


class GlossesPreLayerNorm(GlossesMaskedWords):
    name = "glosses-prelayernorm-mlm"
    about = "RoBERTa-PreLayerNorm (pre-LN), the same texts"
    model_class = RobertaPreLayerNormForMaskedLM
    config_class = RobertaPreLayerNormConfig
    schedule = Schedule(epochs=6, batch_size=64, learning_rate=1.5e-3, weight_decay=0.01)
    seeds = {"a": 51, "b": 52}


def hide(text: Tensor, mask_id: int, generator: Generator) -> Tensors:
    """Replace a random share of every text's words by the mask, at least one.

    Args:
        text: token ids `[texts, length]`; special tokens have the smallest ids and are never hidden.

    Returns:
        `input_ids` with the mask, and `labels` with the hidden words and -100 elsewhere.
    """
    draw = torch.rand(text.shape, generator=generator).masked_fill(text < _SPECIAL_IDS, 2.0)
    hidden = (draw < MASKED) | (draw == draw.min(1, keepdim=True).values)
    hidden &= draw < 2.0
    return {"input_ids": text.masked_fill(hidden, mask_id), "labels": text.masked_fill(~hidden, IGNORED)}


def _mask_id() -> int:
    return list(dict.fromkeys(SPECIALS.values())).index(SPECIALS["mask_token"])


@cache
def _texts(task: str) -> tuple[Sequence[str], dict[str, Tensor]]:
    """A task's texts and which of them each split holds."""
    if task == "a":
        texts = [gloss.definition for gloss in wordnet.glosses("noun")]
    else:
        texts = [gloss.text for part in ("verb", "adj", "adv") for gloss in wordnet.glosses(part)]
    order = torch.randperm(len(texts), generator=Generator().manual_seed(0))[:TEXTS]
    chosen = [texts[i] for i in order.tolist()]
    return chosen, split_indices(len(chosen), VALIDATION, TEST, seed=0)
