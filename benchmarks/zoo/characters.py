"""Tokenizers with one entry a character, for texts of a fixed width over a small alphabet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def character_tokenizer(
    alphabet: Iterable[str], length: int, specials: Mapping[str, str], entry: str = "."
) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts a text into its characters and puts nothing around it.

    Args:
        alphabet: the characters in the order of their ids, behind the special tokens.
        length: the number of characters a text is cut to.
        specials: the special tokens by role (`pad_token`, `unk_token`, ...) in the order of their ids.
        entry: what is one entry, as a regular expression, where that is more than one character.
    """
    names = dict.fromkeys([*specials.values(), *alphabet])
    entries = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(entry), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, model_input_names=["input_ids"], **specials
    )


def encode_fixed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """ASCII texts that all fill the tokenizer's length, as the ids `[texts, length]` that it would give them."""
    table = torch.full((128,), tokenizer.unk_token_id)
    for name, entry in tokenizer.get_vocab().items():
        if len(name) == 1:
            table[ord(name)] = entry
    characters = torch.frombuffer(bytearray("".join(texts), "ascii"), dtype=torch.uint8)
    return table[characters.long()].view(-1, tokenizer.model_max_length)
