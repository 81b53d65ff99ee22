"""Merged causal language models: what their Auto class promises, for one task and by the mean of all."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, pipeline

from hf_zipit import ZipItForCausalLM, evaluate, merge
from hf_zipit.errors import ZipItError

from .. import tiny
from ..processors import tokenizer

IDS = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(0))


@cache
def experts(name: str = "llama") -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair(name), strict=True))


@cache
def merged(name: str = "llama", depth: float = 1.0) -> ZipItForCausalLM:
    return merge(experts(name), IDS, depth=depth)


def greedy(logits_of, ids: Tensor, count: int) -> Tensor:
    """The ids, and the most likely ones that follow, without any cache."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], 1)
    return ids


SETTINGS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("task", ["a", "b", None])
def test_generates_for_one_task_and_for_all(name: str, task: str | None) -> None:
    model = merged(name, 0.5)
    expected = greedy(lambda ids: model(input_ids=ids, task=task).logits, IDS, 4)
    assert torch.equal(model.generate(IDS, task=task, **SETTINGS), expected)
    assert torch.equal(model.for_task(task).generate(IDS, **SETTINGS), expected)


def test_a_cache_is_used_for_one_task() -> None:
    model, lengths = merged(), []
    hook = model.trunk.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    model.generate(IDS, task="b", **SETTINGS)
    hook.remove()
    assert lengths == [6, 1, 1, 1]
    with pytest.raises(ZipItError, match="has no cache"):
        model(input_ids=IDS, past_key_values=model(input_ids=IDS, task="a", use_cache=True).past_key_values)


def test_side_by_side_it_generates_what_the_experts_do() -> None:
    model = merged("llama", 0.0)
    for task, expert in experts().items():
        assert torch.equal(model.generate(IDS, task=task, **SETTINGS), expert.generate(IDS, **SETTINGS))


def test_the_loss_is_that_of_the_next_token() -> None:
    model = merged()
    for task in ("a", "b", None):
        found = model(input_ids=IDS, labels=IDS, task=task)
        expected = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        torch.testing.assert_close(found.loss, expected)


def test_saved_loaded_and_in_a_pipeline(tmp_path: Path) -> None:
    merged().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ZipItForCausalLM
    for task in ("a", None):
        assert torch.equal(loaded.generate(IDS, task=task, **SETTINGS), merged().generate(IDS, task=task, **SETTINGS))
    assert "pipeline_tag: text-generation" in (tmp_path / "README.md").read_text()
    writer = pipeline("text-generation", model=loaded.for_task("a"), tokenizer=tokenizer())
    assert writer("red", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("red")


def test_evaluated_by_the_next_token() -> None:
    model = merged()
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    found = evaluate(model, dict.fromkeys("ab", rows), experts(), metrics="perplexity", batch_size=3)
    for task in "ab":
        with torch.no_grad():
            output = model(input_ids=IDS, labels=IDS, task=task)
        right = (output.logits[:, :-1].argmax(-1) == IDS[:, 1:]).float().mean()
        assert found.model.per_task[task] == pytest.approx(float(right))
        assert found.scores[task]["perplexity"] == pytest.approx(float(output.loss.exp()), rel=1e-4)
        with torch.no_grad():
            own = experts()[task](input_ids=IDS, labels=IDS).loss.exp()
        assert found.expert_scores[task]["perplexity"] == pytest.approx(float(own), rel=1e-4)
