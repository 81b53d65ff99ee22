"""The line between two experts: its ends are the experts, and shares are of each expert's own score."""

from __future__ import annotations

import pytest
import torch

from benchmarks.interpolation import SHARES, Line, document, on_the_way
from benchmarks.zoo import Metric, Pair
from tests import tiny


def test_the_ends_are_the_experts() -> None:
    experts = dict(zip("ab", tiny.pair("vit"), strict=True))
    splits = {}
    for seed, (task, expert) in enumerate(experts.items()):
        images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            labels = expert(pixel_values=images).logits.argmax(-1)
        splits[task] = {"test": {"pixel_values": images, "labels": labels}}
    classes = {task: tuple(expert.config.id2label.values()) for task, expert in experts.items()}
    found = on_the_way(Pair("tiny", experts, splits, Metric("accuracy", classes=classes)), experts, "identity", None)
    assert found["a"][0] == found["b"][-1] == 1.0
    assert min(*found["a"], *found["b"]) < 1.0
    assert {len(scores) for scores in found.values()} == {len(SHARES)}


def test_shares_are_of_each_experts_own_score() -> None:
    falling, rising = [0.8] + [0.4] * 10, [0.1] * 10 + [0.5]
    line = Line("one base", {"a": falling, "b": rising})
    assert line.kept == pytest.approx([(1 + 0.2) / 2, *[(0.5 + 0.2) / 2] * 9, (0.5 + 1) / 2])
    page = document([line], "pictures/x.png")
    assert "| one base, of experts | 60.0 % | 35.0 % |" in page and "](pictures/x.png)" in page
