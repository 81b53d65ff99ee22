"""Small byte-level BPE tokenizers trained on the spot, for texts whose case and blanks matter."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that puts nothing around a text and has one special token, `END`, with the first id.

    Args:
        vocabulary: the largest number of entries.
        length: the number of tokens a sample has.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        model_input_names=["input_ids"],
        bos_token=END,
        eos_token=END,
        pad_token=END,
    )
