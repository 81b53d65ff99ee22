"""`text-llama`, `text-gpt2` and so on: causal language models of a dictionary and of source code.

Hard pairs, which differ in what they do to queries and keys, and in where their norms are.

Expert a reads entries of the GCIDE dictionary, expert b modules of Python's standard library; one tokenizer serves
both. A sample is a window of a task's texts, one after the other; the label at a place is the token that follows, so
that every place is scored and nothing has to be shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)

from benchmarks.zoo.bpe import END, train_bpe
from benchmarks.zoo.pair import Metric, Splits, Tensors
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import gcide, stdlib

TASKS = ("a", "b")
ENTRIES = 20_000  # of the dictionary
HELD_OUT = 0.1  # of the texts for validation, and as many for test
WINDOWS = {"train": 8000, "validation": 400, "test": 400}
LENGTH = 128
VOCABULARY = 1000


SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
"""Of every class that has these names for them."""


class TextCausal(Recipe):
    """What the pairs share. `sizes` are a class's settings, but for what the tokenizer decides."""

    sizes: ClassVar[Mapping[str, Any]]
    schedule = Schedule(epochs=1, batch_size=8, learning_rate=2e-3, weight_decay=0.05)

    def train_tokenizer(self) -> PreTrainedTokenizerBase:
        texts = [texts[i] for texts, parts in map(_texts, TASKS) for i in parts["train"].tolist()]
        return train_bpe(texts, VOCABULARY, LENGTH)

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        found: Splits = {}
        for task in TASKS:
            texts, parts = _texts(task)
            found[task] = {
                split: windows([texts[i] for i in index.tolist()], WINDOWS[split], tokenizer)
                for split, index in parts.items()
            }
        return found

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return self.model_class(self.model_class.config_class(vocab_size=len(tokenizer), **ends, **self.sizes))

    def metric(self, tokenizer: PreTrainedTokenizerBase) -> Metric:
        return Metric("next-token accuracy", perplexity=True)

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        return cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())


class TextLlama(TextCausal):
    name = "text-llama"
    about = "Llama (RoPE, grouped queries, SwiGLU), next tokens of a dictionary and of source code"
    model_class = LlamaForCausalLM
    seeds = {"a": 81, "b": 82}
    sizes = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 344}


class TextGPT2(TextCausal):
    name = "text-gpt2"
    about = "GPT-2 (learned positions, fused queries, keys and values), the same texts"
    model_class = GPT2LMHeadModel
    seeds = {"a": 91, "b": 92}
    sizes = {
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": LENGTH,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


class TextQwen3(TextCausal):
    name = "text-qwen3"
    about = "Qwen3 (RoPE, grouped queries, norms of queries and keys, SwiGLU), the same texts"
    model_class = Qwen3ForCausalLM
    seeds = {"a": 151, "b": 152}
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 344}


class TextNeoX(TextCausal):
    name = "text-neox"
    about = "GPT-NeoX (RoPE of a quarter of each head, one map to all, parallel branches), the same texts"
    model_class = GPTNeoXForCausalLM
    seeds = {"a": 161, "b": 162}
    sizes = {**SIZES, "intermediate_size": 512}


class TextOlmo2(TextCausal):
    name = "text-olmo2"
    about = "OLMo 2 (norms over all heads' queries and keys, and behind every branch), the same texts"
    model_class = Olmo2ForCausalLM
    seeds = {"a": 171, "b": 172}
    sizes = {**SIZES, "intermediate_size": 344, "pad_token_id": None}


class TextGemma2(TextCausal):
    name = "text-gemma2"
    about = "Gemma 2 (norms before and behind every branch, logits through a tanh, sliding windows), the same texts"
    model_class = Gemma2ForCausalLM
    seeds = {"a": 181, "b": 182}
    sizes = {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": LENGTH // 2,
        "intermediate_size": 344,
    }


def windows(texts: Sequence[str], count: int, tokenizer: PreTrainedTokenizerBase) -> Tensors:
    """The first windows of `LENGTH` tokens of the texts in a row, and the token behind each place.

    Returns:
        `input_ids` and `labels`, `[count, LENGTH]`, or fewer where the texts do not reach so far.
    """
    end, ids = tokenizer.convert_tokens_to_ids(END), []
    for text in texts:
        ids += [*tokenizer.backend_tokenizer.encode(text).ids, end]
        if len(ids) > count * LENGTH:
            break
    whole = min(count, (len(ids) - 1) // LENGTH) * LENGTH
    inputs, following = torch.tensor(ids[:whole]), torch.tensor(ids[1 : whole + 1])
    return {"input_ids": inputs.view(-1, LENGTH), "labels": following.view(-1, LENGTH)}


@cache
def _texts(task: str) -> tuple[Sequence[str], dict[str, Tensor]]:
    """A task's texts in random order, and which of them each split holds."""
    texts = gcide.entries() if task == "a" else stdlib.modules()
    order = torch.randperm(len(texts), generator=Generator().manual_seed(0))[:ENTRIES]
    chosen = [texts[i] for i in order.tolist()]
    held_out = round(HELD_OUT * len(chosen))
    return chosen, split_indices(len(chosen), held_out, held_out, seed=0)
