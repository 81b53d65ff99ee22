"""lm-evaluation-harness, lighteval and MTEB measure a task of a merged model as they measure its expert."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, LlamaForCausalLM

import hf_zipit
from tests import tiny
from tests.processors import WORDS, tokenizer

TEXTS = ["the red boot", "a photo of the cap", "a blue shirt", "the cap of the photo"]

pytestmark = pytest.mark.skipif("HF_ZIPIT_NIGHTLY" not in os.environ, reason="HF_ZIPIT_NIGHTLY is not set")

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""

LIGHTEVAL = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def prompt(line, task_name=None):
    choices = [f" {choice}" for choice in line["choices"]]
    return Doc(task_name=task_name, query=line["question"], choices=choices, gold_index=line["answer"])

TASKS_TABLE = [LightevalTaskConfig(
    name="colours", prompt_function=prompt, hf_repo="data", hf_subset="default", hf_avail_splits=["test"],
    evaluation_splits=["test"], metrics=[Metrics.loglikelihood_acc], stop_sequence=[],
)]
"""


def test_lm_eval_takes_a_view_of_a_merged_decoder(tmp_path: Path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": TEXTS[i % 4], "choices": ["red boot", "blue cap"], "answer": i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "colours.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    experts = {task: tiny.build("llama", seed, vocab_size=len(WORDS)) for seed, task in enumerate("ab")}
    apart = hf_zipit.merge(experts, depth=0.0)

    def answers(model: LlamaForCausalLM) -> list[list[float]]:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=4), tasks=["colours"], task_manager=manager
        )
        return [[score for score, _ in sample["filtered_resps"]] for sample in found["samples"]["colours"]]

    for task, expert in experts.items():
        assert torch.allclose(*(torch.tensor(answers(m)) for m in (apart.for_task(task), expert)), atol=1e-3)


def test_mteb_takes_a_merged_encoder(tmp_path: Path):
    mteb = pytest.importorskip("mteb")
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    unknown = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")

    class Colours(AbsTaskSTS):
        metadata = TaskMetadata(
            name="Colours", dataset={"path": "me/colours", "revision": "1"}, description="Sentences", type="STS",
            category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="cosine_spearman", sample_creation=None, bibtex_citation=None, **dict.fromkeys(unknown),
        )  # fmt: skip

        def load_data(self, **_: Any) -> None:
            pairs = {"sentence1": TEXTS, "sentence2": TEXTS[1:] + TEXTS[:1], "score": [4.0, 3.0, 2.0, 1.0]}
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(pairs)), True

    experts = {}
    for seed, task in enumerate(("legal", "medical")):
        model: BertModel = tiny.build("bert", seed, vocab_size=len(WORDS))
        model.save_pretrained(tmp_path / task)
        tokenizer().save_pretrained(tmp_path / task)
        parts = [modules.Transformer(str(tmp_path / task)), modules.Pooling(32, "mean"), modules.Normalize()]
        experts[task] = st.SentenceTransformer(modules=parts, device="cpu")
    hf_zipit.merge(experts, TEXTS, depth=0.0).save_pretrained(str(tmp_path / "both"))

    def score(model: Any) -> float:
        found = mteb.evaluate(model, tasks=[Colours()], cache=None, show_progress_bar=False)
        return found.task_results[0].scores["test"][0]["main_score"]

    for task, expert in experts.items():
        view = st.SentenceTransformer(str(tmp_path / "both"), config_kwargs={"task": task}, device="cpu")
        assert score(view) == pytest.approx(score(expert), abs=1e-6)


def test_lighteval_takes_a_task_of_a_merged_decoder_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lighteval")
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.models.transformers.transformers_model import TransformersModelConfig
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    monkeypatch.chdir(tmp_path)
    builtin = "lighteval.tasks.registry.Registry._load_from_files"
    monkeypatch.setattr(builtin, staticmethod(lambda *_: {}))  # its own tasks download while they are imported
    monkeypatch.setattr(builtin.replace("files", "subdirs"), staticmethod(lambda *_: {}))
    rows = [{"question": TEXTS[i % 4], "choices": ["red boot", "blue cap"], "answer": i % 2} for i in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "colours.py").write_text(LIGHTEVAL)
    experts = {task: tiny.build("llama", seed, vocab_size=len(WORDS)) for seed, task in enumerate("ab")}
    apart = hf_zipit.merge(experts, depth=0.0)

    def scores(model: LlamaForCausalLM, folder: Path) -> list[list[float]]:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        pipeline = Pipeline(
            "colours|0",
            PipelineParameters(launcher_type=ParallelismManager.NONE, custom_tasks_directory="own/colours.py"),
            EvaluationTracker(output_dir=str(folder / "results")),
            TransformersModelConfig(model_name=str(folder), batch_size=4, max_length=16, device="cpu"),
        )
        pipeline.evaluate()
        (found,) = pipeline.evaluation_tracker.details.values()
        return [list(map(float, each["model_response"]["logprobs"])) for each in found]

    for task, expert in experts.items():
        own, taken = scores(expert, tmp_path / task), scores(apart.expert(task), tmp_path / f"{task}-taken")
        assert len(own) == len(rows)
        assert torch.allclose(torch.tensor(own), torch.tensor(taken), atol=1e-3)
