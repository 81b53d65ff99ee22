"""`wordnet-bert`: what kind of thing does a definition define? Two BERTs (post-LN), six classes of nouns each.

The text is a noun's definition without its examples, the label its lexicographer file. The twelve largest files are
dealt out in turn, so that both tasks mix things, beings and ideas, and are cut to `PER_CLASS` definitions each.
"""

from __future__ import annotations

from functools import cache

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from benchmarks.zoo.pair import Metric, Splits, rows
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import wordnet
from benchmarks.zoo.wordpiece import encode, train_wordpiece

CLASSES = {
    "a": ("artifact", "plant", "act", "state", "attribute", "cognition"),
    "b": ("person", "animal", "communication", "location", "substance", "group"),
}
PER_CLASS = 3000
VALIDATION = TEST = 1500
VOCABULARY = 4096
LENGTH = 32
SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


class WordNetBert(Recipe):
    name = "wordnet-bert"
    about = "BERT (post-LN), WordNet definitions by lexicographer file, 6 + 6 classes"
    model_class = BertForSequenceClassification
    schedule = Schedule(epochs=8, batch_size=64, learning_rate=1e-3, weight_decay=0.05)
    seeds = {"a": 31, "b": 32}

    def train_tokenizer(self) -> PreTrainedTokenizerBase:
        texts = [texts[i] for texts, _, parts in map(_definitions, CLASSES) for i in parts["train"].tolist()]
        return train_wordpiece(texts, VOCABULARY, LENGTH, SPECIALS)

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        found: Splits = {}
        for task in CLASSES:
            texts, labels, parts = _definitions(task)
            data = encode(tokenizer, texts) | {"labels": torch.tensor(labels)}
            found[task] = {split: rows(data, index) for split, index in parts.items()}
        return found

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> BertForSequenceClassification:
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=512,
                max_position_embeddings=LENGTH,
                pad_token_id=tokenizer.pad_token_id,
                id2label=dict(enumerate(CLASSES[task])),
                label2id={name: i for i, name in enumerate(CLASSES[task])},
            )
        )

    def metric(self, tokenizer: PreTrainedTokenizerBase) -> Metric:
        return Metric("accuracy", classes=CLASSES)


@cache
def _definitions(task: str) -> tuple[list[str], list[int], dict[str, torch.Tensor]]:
    """The task's texts, their labels, and which of them each split holds."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES[task]):
        chosen = [gloss.definition for gloss in wordnet.glosses("noun") if gloss.noun_file == name]
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(label))[:PER_CLASS]
        texts += [chosen[i] for i in order.tolist()]
        labels += [label] * len(order)
    return texts, labels, split_indices(len(texts), VALIDATION, TEST, seed=0)
