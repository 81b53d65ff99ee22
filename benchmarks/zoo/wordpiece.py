"""Small WordPiece tokenizers trained on the spot, so that the zoo needs no download."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.zoo.pair import Tensors


def train_wordpiece(
    texts: Iterable[str], vocabulary: int, length: int, specials: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer that puts a first and a last token around a text.

    Args:
        vocabulary: the largest number of entries.
        length: the number of tokens a text is cut to.
        specials: the special tokens by role (`pad_token`, `unk_token`, ...) in the order of their ids. The first token
            of a text is `cls_token` or, without one, `bos_token`; the last is `sep_token` or `eos_token`.
    """
    tokenizer = _plain(specials)
    names = list(dict.fromkeys(specials.values()))
    texts = list(texts)
    # The trainer numbers word-inner letters in the order of a randomly seeded hash map and breaks ties by number, so
    # that its vocabulary changes from run to run. Given as special tokens they have fixed numbers.
    letters = sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text)} - {" "})
    inner = [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=names + inner, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    entries = tokenizer.get_vocab()
    tokenizer = _plain(specials, entries)
    first = specials.get("cls_token") or specials["bos_token"]
    last = specials.get("sep_token") or specials["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(name, names.index(name)) for name in (first, last)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensors:
    """`input_ids` and `attention_mask`, `[texts, the tokenizer's length]`, padded and cut to that length."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _plain(specials: Mapping[str, str], entries: dict[str, int] | None = None) -> Tokenizer:
    """BERT's way of cutting a text into pieces, with the given entries."""
    tokenizer = Tokenizer(models.WordPiece(entries or {}, unk_token=specials["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
