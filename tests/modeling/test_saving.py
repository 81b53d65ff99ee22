"""What is saved and loaded again is the same model, through the Auto classes, with and without importing hf_zipit."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModel, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import hf_zipit
from tests import tiny

from .by_hand import FAMILIES, make_experts, make_inputs, merge_by_hand

ROOT = Path(__file__).parents[2]


@torch.no_grad()
def test_saved_and_loaded_outputs_are_bit_identical(family: str, shared: tuple[str, ...], tmp_path: Path) -> None:
    entry = {"module": "classifier", "axis": -1, "units": 32, "size": 32, "kind": "dense"}
    entries = [entry] if family in ("vit", "bert") else []
    merged = merge_by_hand(make_experts(family, shared), shared, entries=entries)
    for index, weight in enumerate(merged.entries.parameters()):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    inputs = make_inputs(family)
    merged.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, merged.auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(merged)
    assert not any(info.values())
    for task in (None, *merged.config.tasks):
        assert torch.equal(loaded(**inputs, task=task)[0], merged(**inputs, task=task)[0])
    tensors = merged.state_dict()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    loaded.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "model.safetensors").read_bytes()


@torch.no_grad()
def test_head_and_embeddings_are_not_tied_again(tmp_path: Path) -> None:
    experts = make_experts("bert-lm", ("bert",))
    assert all(expert.config.tie_word_embeddings for expert in experts.values())
    merged = merge_by_hand(experts, ("bert",))
    merged.tie_weights()
    merged.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    embeddings = loaded.get_input_embeddings().weight
    decoders = [loaded.branch(task).cls.predictions.decoder.weight for task in loaded.config.tasks]
    assert torch.equal(embeddings, experts["clothes"].bert.embeddings.word_embeddings.weight)
    for decoder, expert in zip(decoders, experts.values(), strict=True):
        assert isinstance(expert, BertForMaskedLM)
        assert torch.equal(decoder, expert.cls.predictions.decoder.weight)


@torch.no_grad()
def test_forward_passes_that_ask_whether_weights_are_tied_get_the_experts_answer(tmp_path: Path) -> None:
    """UMT5 scales what its head reads if that is tied to the embeddings."""
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    expert = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**sizes)).eval()
    ids = torch.arange(3, 10)[None]
    expected = expert(input_ids=ids, decoder_input_ids=ids).logits
    merged = hf_zipit.merge({"a": expert, "b": copy.deepcopy(expert)}, method="identity", refit=None)
    assert torch.equal(merged(input_ids=ids, decoder_input_ids=ids, task="a").logits, expected)
    merged.expert("b").save_pretrained(tmp_path)
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert plain.lm_head.weight is plain.shared.weight
    assert torch.equal(plain(input_ids=ids, decoder_input_ids=ids).logits, expected)


@torch.no_grad()
def test_shards_load_like_one_file(tmp_path: Path) -> None:
    shared = FAMILIES["vit"].part
    merged = merge_by_hand(make_experts("vit", shared), shared)
    merged.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**make_inputs("vit")).logits, merged(**make_inputs("vit")).logits)


@torch.no_grad()
def test_loading_in_another_dtype_keeps_the_indices(tmp_path: Path) -> None:
    entry = {"module": "classifier", "axis": -1, "units": 32, "size": 32}
    merged = merge_by_hand(make_experts("vit", ("vit",)), ("vit",), entries=[entry])
    merged.entries["clothes"][0].index.copy_(torch.randperm(32))
    merged.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.entries["clothes"][0].index, merged.entries["clothes"][0].index)


READ = """
import sys, torch, transformers
assert "hf_zipit" not in sys.modules
for family, auto in {families}.items():
    model = getattr(transformers, auto).from_pretrained(family, trust_remote_code=True)
    inputs = torch.load(family + ".inputs", weights_only=True)
    with torch.no_grad():
        outputs = [model(**inputs, task=task)[0] for task in (None, *model.config.tasks)]
    torch.save(outputs, family + ".outputs")
    model.save_pretrained(family + "-again")
"""


@torch.no_grad()
def test_a_fresh_process_that_trusts_the_folder_loads_it(tmp_path: Path) -> None:
    families = {"vit": "AutoModelForImageClassification", "bert-lm": "AutoModelForMaskedLM", "clip": "AutoModel"}
    wanted = {}
    for family in families:
        shared = FAMILIES[family].part
        merged = merge_by_hand(make_experts(family, shared), shared)
        inputs = make_inputs(family)
        merged.save_pretrained(tmp_path / family)
        torch.save(inputs, tmp_path / f"{family}.inputs")
        wanted[family] = [merged(**inputs, task=task)[0] for task in (None, *merged.config.tasks)]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", READ.format(families=families)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for family, outputs in wanted.items():
        found = torch.load(tmp_path / f"{family}.outputs", weights_only=True)
        assert all(torch.equal(one, other) for one, other in zip(found, outputs, strict=True))
        again = tmp_path / f"{family}-again"
        assert [path.name for path in again.glob("*.py")] == ["modeling_hf_zipit.py"]
        assert (again / "model.safetensors").read_bytes() == (tmp_path / family / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "depth", "count"), [("bert-masked", 0.5, 56), ("gpt2", 1.0, 44), ("bart", 0.0, 56)])
def test_a_vocabulary_is_made_longer_or_shorter(tmp_path: Path, name: str, depth: float, count: int) -> None:
    experts = {task: tiny.build(name, seed) for seed, task in enumerate("ab")}
    merged = hf_zipit.merge(experts, method="identity", depth=depth)
    ids = torch.tensor([[3, 7, 9, 2]])
    before = merged(input_ids=ids, task="b").logits
    assert len(merged.resize_token_embeddings(count).weight) == count
    after, kept = merged(input_ids=ids, task="b").logits, min(count, 50)
    assert after.shape[-1] == count and torch.allclose(after[..., :kept], before[..., :kept], atol=1e-6)
    merged.save_pretrained(tmp_path / "m")
    again = type(merged).from_pretrained(tmp_path / "m")
    assert torch.equal(again(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_other_tables_than_the_vocabulary_s_keep_their_length(tmp_path: Path) -> None:
    """T5's tables of relative positions, with a column for every head of a refit, have as many rows as tokens here."""
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=32, relative_attention_num_buckets=32, **small)
    experts = {task: T5ForConditionalGeneration(config).eval() for task in "ab"}
    for expert in experts.values():
        for path, table in expert.named_parameters():
            table.data = table.data if "norm" in path else torch.randn_like(table)
    texts = {name: torch.randint(1, 32, (8, 6)) for name in ("input_ids", "decoder_input_ids")}
    merged = hf_zipit.merge(experts, texts, method="identity", refit=True)
    assert merged.config.trunk_shapes
    merged.resize_token_embeddings(40)
    merged.save_pretrained(tmp_path / "m")
    assert type(merged).from_pretrained(tmp_path / "m").config.trunk_shapes == merged.config.trunk_shapes
