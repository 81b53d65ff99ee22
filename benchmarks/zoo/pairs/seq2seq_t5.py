"""`seq2seq-t5`: small T5s that translate between notations, one of numbers and one of dates. A hard pair.

A source says which notation is wanted and gives one, `roman 419`; the target is the same in the wanted one, `CDXIX`. A
word is one token, and so is every digit, sign and Roman letter. The decoder is given the target's tokens before each
place, as in training, and is scored on the token at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from benchmarks.zoo.characters import character_tokenizer
from benchmarks.zoo.pair import IGNORED, Metric, Splits, Tensors
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import notations

NOTATIONS: dict[str, tuple[range, Callable[[int], dict[str, str]]]] = {
    "a": (notations.NUMBERS, notations.number),
    "b": (notations.DAYS, notations.day),
}
"""By task, what is written, and how."""

SAMPLES = {"train": 32_000, "validation": 1000, "test": 1000}
HELD_OUT = 500  # numbers or days that only validation has, and as many for test
SOURCE, TARGET = 20, 16  # tokens, the closing one included
SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


class Seq2SeqT5(Recipe):
    name = "seq2seq-t5"
    about = "T5 (relative positions, encoder and decoder), notations of numbers and of dates"
    model_class = T5ForConditionalGeneration
    schedule = Schedule(epochs=2, batch_size=32, learning_rate=1e-3, weight_decay=0.01)
    seeds = {"a": 111, "b": 112}

    def train_tokenizer(self) -> PreTrainedTokenizerBase:
        wanted = [name for _, write in NOTATIONS.values() for name in write(1)]
        alphabet = [*notations.SIGNS, *notations.WORDS, *wanted]
        return character_tokenizer(alphabet, SOURCE, SPECIALS, entry="[a-z]+|.")

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        return {task: {split: encoded(_samples(task, split), tokenizer) for split in SAMPLES} for task in self.seeds}

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=3,
                num_heads=4,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=32,
                dropout_rate=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.pad_token_id,
            )
        )

    def metric(self, tokenizer: PreTrainedTokenizerBase) -> Metric:
        return Metric("target-token accuracy", perplexity=True)

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return cross_entropy(model(**inputs).logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def encoded(samples: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Tensors:
    """Pairs of a source and a target as what a T5 reads; the label of a place is the target's token there."""
    encode, end, start = tokenizer.backend_tokenizer.encode_batch, tokenizer.eos_token_id, tokenizer.pad_token_id
    sources, targets = ([[*text.ids, end] for text in encode(list(texts))] for texts in zip(*samples, strict=True))
    source, labels = filled(sources, SOURCE, start), filled(targets, TARGET, IGNORED)
    before = filled([[start, *ids[:-1]] for ids in targets], TARGET, tokenizer.pad_token_id)
    mask = (source != tokenizer.pad_token_id).long()
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": before, "labels": labels}


def filled(rows: list[list[int]], length: int, value: int) -> Tensor:
    """Rows of numbers as `[rows, length]`, `value` behind their ends."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


@cache
def _samples(task: str, split: str) -> list[tuple[str, str]]:
    """A split's sources and targets; every split has its own numbers or days."""
    values, write = NOTATIONS[task]
    generator, names = Generator().manual_seed(list(SAMPLES).index(split)), list(write(values[0]))
    known = split_indices(len(values), HELD_OUT, HELD_OUT, seed=0)[split]
    chosen = known[torch.randint(len(known), (SAMPLES[split],), generator=generator)].tolist()
    given = torch.randint(len(names), (len(chosen),), generator=generator)
    wanted = (given + torch.randint(1, len(names), (len(chosen),), generator=generator)) % len(names)
    found = []
    for i, source, target in zip(chosen, given.tolist(), wanted.tolist(), strict=True):
        written = write(values[i])
        found.append((f"{names[target]} {written[names[source]]}", written[names[target]]))
    return found
