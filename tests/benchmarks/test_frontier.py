"""The ceiling and the page that shows it: distillation comes nearer, labels are not read, shares of the way add up."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import ceiling, frontier
from benchmarks.measure import EXPERTS, Row, scored
from benchmarks.zoo import Metric, Pair
from hf_zipit.merging import merge


@pytest.fixture(scope="module")
def tiny_pair() -> Pair:
    """Two untrained Llamas on random tokens."""
    experts, splits = {}, {}
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, **heads)
        experts[task] = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 12, (24, 9), generator=torch.Generator().manual_seed(seed))
        data = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        splits[task] = dict.fromkeys(("train", "validation", "test"), data)
    return Pair("tiny", experts, splits, Metric("next-token accuracy", perplexity=True))


def test_distillation_comes_nearer_to_the_experts(tiny_pair: Pair) -> None:
    data = {task: tiny_pair.calibration(task, 16) for task in tiny_pair.experts}
    assert all("labels" not in samples for samples in data.values())
    before = merge(tiny_pair.experts, method="identity")
    after = ceiling.distilled(tiny_pair, data, start="average", steps=40, rate=1e-2)
    for task, samples in data.items():
        with torch.no_grad():
            apart = [float(ceiling.distance(tiny_pair, merged, task, samples)) for merged in (before, after)]
        assert apart[1] < 0.7 * apart[0]
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())


def test_experts_are_at_no_distance_from_themselves(tiny_pair: Pair) -> None:
    same = dict.fromkeys("ab", tiny_pair.experts["a"])
    pair = Pair("tiny", same, tiny_pair.splits, tiny_pair.metric)
    merged = merge(same, method="identity")
    with torch.no_grad():
        apart = ceiling.distance(pair, merged, "b", pair.calibration("b", 8))
    assert float(apart) == pytest.approx(0.0, abs=1e-5)


def test_a_merged_language_model_is_scored_by_next_tokens_and_perplexity(tiny_pair: Pair) -> None:
    merged = merge(tiny_pair.experts, method="identity")
    row = scored(tiny_pair, merged, "test")
    for task in "ab":
        data = tiny_pair.splits[task]["test"]
        with torch.no_grad():
            logits = merged(input_ids=data["input_ids"], task=task).logits
        hits = (logits.argmax(-1) == data["labels"]).float().mean()
        likelihood = logits.log_softmax(-1).gather(-1, data["labels"][..., None]).mean()
        assert row["scores"][task] == pytest.approx(float(hits))
        assert row["perplexities"][task] == pytest.approx(math.exp(-likelihood), rel=1e-4)
    assert row["joint"] is None


def test_the_share_of_the_way_is_between_the_best_alignment_and_the_ceiling() -> None:
    def row(method: str, score: float, depth: float | None = 1.0) -> Row:
        return Row("text-llama", method, depth, "test", 512, scores={"a": score, "b": score}, size=1.0)

    rows = [row(EXPERTS, 0.9, None), row("average", 0.1), row("permute", 0.3), row("permute + refit", 0.5)]
    rows.append(row(ceiling.CEILING, 0.7))
    means = {each.method: each.mean for each in rows}
    assert [frontier.progress(each, means) for each in rows] == pytest.approx([None, -0.5, 0.0, 0.5, 1.0])
    page = frontier.document(rows, "test", 512, "COMMAND")
    assert "| permute + refit | .500 | .500 | .500 | 55.6 % | 50 % | 1.00 | - |" in page
    without = {name: mean for name, mean in means.items() if name != ceiling.CEILING}
    assert frontier.progress(rows[2], without) is None
