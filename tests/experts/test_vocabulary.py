"""Experts with tokenizers of their own: every text means to a renumbered expert what it meant, and so to the merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import hf_zipit
from hf_zipit.errors import DataError, ExpertError
from hf_zipit.experts.loading import load_experts
from hf_zipit.experts.vocabulary import united
from hf_zipit.hub.processors import OwnProcessor
from tests import tiny

WORDS = {
    "a": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "boot", "cap"),
    "b": ("[PAD]", "[CLS]", "[UNK]", "[SEP]", "sea", "red", "moon", "boot"),
}
TEXTS = {"a": ["red boot", "cap", "boot boot cap red"], "b": ["sea red moon", "boot moon", "red"]}


def tokenizer(words: tuple[str, ...], kind: str) -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate(words)}
    if kind == "unigram":
        core = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=numbers["[UNK]"]))
    elif kind == "bpe":
        letters = sorted({letter for word in words for letter in word} | set("sunmoredcapbt"))
        core = Tokenizer(models.BPE({x: i for i, x in enumerate((*words, *letters))}, [], unk_token="[UNK]"))
    else:
        core = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"])]
    core.post_processor = processors.BertProcessing(*ends)
    if kind != "bpe":
        core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def expert(folder: Path, task: str, kind: str = "words", name: str = "bert-sequence", seed: int = 0) -> Path:
    own = tokenizer(WORDS[task], kind)
    size = {"vocab_size": len(own), "pad_token_id": own.pad_token_id}
    tiny.build(name, seed, **size).save_pretrained(folder / task)
    own.save_pretrained(folder / task)
    return folder / task


def answers(model: PreTrainedModel, reader: PreTrainedTokenizerFast, texts: list[str], **more: str) -> Tensor:
    read = reader(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=read.input_ids, attention_mask=read.attention_mask, **more).logits


@pytest.mark.parametrize("kind", ["words", "bpe", "unigram"])
def test_a_renumbered_expert_reads_every_text_as_before(tmp_path: Path, kind: str):
    loaded = load_experts({task: expert(tmp_path, task, kind) for task in WORDS})
    before = {task: model.get_input_embeddings().weight.clone() for task, model in loaded.items()}
    both = united(loaded)
    assert len({model.config.vocab_size for model in both.values()}) == 1
    assert united(both) == both
    for task, model in both.items():
        texts = [*TEXTS["a"], *TEXTS["b"], "unknown word"]
        own, new = AutoTokenizer.from_pretrained(tmp_path / task), OwnProcessor(model).loaded
        assert [own.tokenize(text) for text in texts] == [new.tokenize(text) for text in texts]
        assert torch.allclose(answers(loaded[task], own, texts), answers(model, new, texts), atol=1e-6)
        assert torch.equal(loaded[task].get_input_embeddings().weight, before[task])
    assert len({tuple(OwnProcessor(model).loaded("red boot").input_ids) for model in both.values()}) == 1


def test_a_merge_of_one_model_under_two_numberings_is_that_model(tmp_path: Path):
    folders = {task: expert(tmp_path, task) for task in WORDS}
    one = tiny.build("bert-sequence", 0, vocab_size=len(WORDS["a"]))
    other = tiny.build("bert-sequence", 0, vocab_size=len(WORDS["b"]))
    rows = {word: torch.randn(one.config.hidden_size) for own in WORDS.values() for word in own}
    other.load_state_dict({n: t for n, t in one.state_dict().items() if "word_emb" not in n}, strict=False)
    for task, model in zip(WORDS, (one, other), strict=True):
        model.get_input_embeddings().weight.data.copy_(torch.stack([rows[word] for word in WORDS[task]]))
        model.save_pretrained(folders[task])
    hf_zipit.merge(folders, method="identity", vocabulary="union", output_dir=tmp_path / "merged")
    merged = hf_zipit.ZipItForSequenceClassification.from_pretrained(tmp_path / "merged")
    for task, model in zip(WORDS, (one, other), strict=True):
        old = AutoTokenizer.from_pretrained(folders[task])
        new = AutoTokenizer.from_pretrained(tmp_path / "merged" / "processors" / task)
        expected = answers(model, old, TEXTS[task])
        assert torch.allclose(expected, answers(merged, new, TEXTS[task], task=task), atol=1e-5)


def test_a_token_that_one_expert_has_is_that_experts_in_any_basis(tmp_path: Path):
    folders = {task: expert(tmp_path, task, seed=seed) for seed, task in enumerate(WORDS)}
    merged = hf_zipit.merge(folders, method="weights", vocabulary="union")
    both = united(load_experts(folders))
    table, own = (model.get_input_embeddings().weight for model in (merged.expert("b"), both["b"]))
    alone = ~both["a"].held_rows
    assert alone.sum() == 2  # sea and moon
    lengths = [torch.sort(weight[alone].abs()).values for weight in (table, own)]
    assert torch.allclose(*lengths, atol=1e-5)  # the same numbers, in another order


def test_what_cannot_be_united_is_one_sentence(tmp_path: Path):
    folders = {task: expert(tmp_path, task) for task in WORDS}
    with pytest.raises(ExpertError, match=r"token 1 is '\[UNK\]' for 'a' and '\[CLS\]' for 'b'; pass vocabulary='u"):
        hf_zipit.plan(folders, data=False)
    with pytest.raises(DataError, match="by task"):
        hf_zipit.merge(folders, TEXTS["a"], vocabulary="union")
    numbers = {task: torch.ones(4, 5, dtype=torch.long) for task in WORDS}
    with pytest.raises(DataError, match="must be texts"):
        hf_zipit.merge(folders, numbers, vocabulary="union")
    with pytest.raises(ExpertError, match="has no tokenizer beside its weights"):
        hf_zipit.plan({task: tiny.build("bert", 0) for task in WORDS}, data=False, vocabulary="union")


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("bart", True)])
def test_writers_never_write_what_their_expert_cannot(tmp_path: Path, name: str, tied: bool):
    for seed, task in enumerate(WORDS):
        own = tokenizer(WORDS[task], "words")
        roles = {"pad_token_id": own.pad_token_id, "bos_token_id": own.cls_token_id, "eos_token_id": own.sep_token_id}
        tiny.build(name, seed, vocab_size=len(own), tie_word_embeddings=tied, **roles).save_pretrained(tmp_path / task)
        own.save_pretrained(tmp_path / task)
    folders = {task: tmp_path / task for task in WORDS}
    loaded, both = load_experts(folders), united(load_experts(folders))
    for task, model in both.items():
        old, new = AutoTokenizer.from_pretrained(folders[task]), OwnProcessor(model).loaded
        held = torch.tensor([new.convert_tokens_to_ids(word) for word in WORDS[task]])
        before, after = (answers(m, t, TEXTS[task]) for m, t in ((loaded[task], old), (model, new)))
        assert torch.allclose(before, after[..., held], atol=1e-6)
    made = hf_zipit.merge(folders, method="weights", vocabulary="union", output_dir=tmp_path / "merged")
    merged = type(made).from_pretrained(tmp_path / "merged")
    for task, model in both.items():
        new = OwnProcessor(model).loaded
        read = new(TEXTS[task], padding=True, return_tensors="pt")
        logits = answers(merged, new, TEXTS[task], task=task)
        assert logits[..., ~model.held_rows].max() < logits[..., model.held_rows].min()
        written = merged.generate(read.input_ids, attention_mask=read.attention_mask, task=task, max_new_tokens=4)
        assert model.held_rows[written].all()
    with pytest.raises(ExpertError, match="its head rules out tokens"):
        merged.expert("a")
