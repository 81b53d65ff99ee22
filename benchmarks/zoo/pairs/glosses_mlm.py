"""`glosses-roberta-mlm` and `glosses-prelayernorm-mlm`: masked-word models on two text sources, post-LN and pre-LN.

Expert a reads definitions of nouns, expert b glosses of verbs, adjectives and adverbs with their example sentences;
one tokenizer serves both. Whole words are hidden, not the pieces that a rare word is cut into: letters in the middle
of a name can only be guessed. Every split is masked once and for all: the labels are the hidden words. Training draws
new masks for every batch, which it can because `input_ids` and `labels` together hold the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from benchmarks.zoo.masking import hide, shown
from benchmarks.zoo.pair import IGNORED, Metric, Splits, Tensors, rows
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import wordnet
from benchmarks.zoo.wordpiece import encode, train_wordpiece

TASKS = ("a", "b")
TEXTS = 34_000  # of each source
VALIDATION = TEST = 2000
VOCABULARY = 4096
LENGTH = 32
MASKED = 0.2  # of the words
SPECIALS = {  # in RoBERTa's order, so that the ids are the ones its configuration expects
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}


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
            masked = hidden_words(encoded["input_ids"], tokenizer, Generator().manual_seed(0))
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

    def augment(self, batch: Tensors, tokenizer: PreTrainedTokenizerBase, generator: Generator) -> Tensors:
        return batch | hidden_words(shown(batch), tokenizer, generator)

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        """The model's own loss; the vocabulary's logits are computed at the hidden words only: cheaper."""
        hidden = batch["labels"] != IGNORED
        features = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return cross_entropy(model.lm_head(features[hidden]), batch["labels"][hidden])


class GlossesRoberta(GlossesMaskedWords):
    name = "glosses-roberta-mlm"
    about = "RoBERTa (post-LN), masked words of noun glosses and of verb and adjective glosses with examples"
    model_class = RobertaForMaskedLM
    config_class = RobertaConfig
    schedule = Schedule(epochs=4, batch_size=32, learning_rate=1e-3, weight_decay=0.01)
    seeds = {"a": 41, "b": 42}


class GlossesPreLayerNorm(GlossesMaskedWords):
    name = "glosses-prelayernorm-mlm"
    about = "RoBERTa-PreLayerNorm (pre-LN), the same texts"
    model_class = RobertaPreLayerNormForMaskedLM
    config_class = RobertaPreLayerNormConfig
    schedule = Schedule(epochs=4, batch_size=32, learning_rate=1e-3, weight_decay=0.01)
    seeds = {"a": 51, "b": 52}


def hidden_words(text: Tensor, tokenizer: PreTrainedTokenizerBase, generator: Generator) -> Tensors:
    """Texts `[texts, length]` with a share of their words hidden."""
    return hide(text, whole_words(text, tokenizer), MASKED, tokenizer.mask_token_id, generator)


def whole_words(text: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which tokens are a word or punctuation mark of their own: `[texts, length]`, bool."""
    special, inner = _vocabulary(tokenizer)
    continued = pad(inner[text[:, 1:]], (0, 1))
    return ~(special[text] | inner[text] | continued)


@lru_cache(maxsize=1)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Which entries are special tokens, and which continue a word."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = torch.tensor([name in tokenizer.all_special_tokens for name in names])
    return special, torch.tensor([name.startswith("##") for name in names])


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
