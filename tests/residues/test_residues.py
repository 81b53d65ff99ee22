"""Residues of a merge: what a budget buys, that all of it is the expert, and files."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_zipit import MergeConfig, merge, plan
from hf_zipit.errors import RecipeError
from hf_zipit.modeling.kinds.low_rank import LowRank, factors
from hf_zipit.modeling.kinds.signs import Signs
from hf_zipit.modeling.residue import TaskTensor
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.residues.stage import spend
from tests import tiny


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = draw(12, 3, 16, 16).float()
DATA = {"a": IMAGES[:6], "b": IMAGES[6:]}


@cache
def experts() -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


@cache
def merged(size: float, kind: str = "signs") -> nn.Module:
    residues = {"size": size, "kind": kind} if size > 1 else None
    return merge(experts(), DATA, method="permute", residues=residues)


@torch.no_grad()
def off(model: nn.Module, task: str) -> float:
    """How far a task's logits are from its expert's, relative to these."""
    expected = experts()[task](pixel_values=IMAGES).logits
    return float((model(pixel_values=IMAGES, task=task).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["signs", "low-rank"])
def test_a_larger_budget_leaves_less_and_is_not_exceeded(kind: str):
    before = {task: off(merged(1.0), task) for task in "ab"}
    for size in (1.2, 1.5):
        model = merged(size, kind)
        bare, kept = residue_bytes(model)
        assert min(0.9 * (size - 1), 0.4) < kept / bare <= size - 1  # eight planes are all there are
        after = {task: off(model, task) for task in "ab"}
        assert all(after[task] < before[task] for task in "ab")
        before = after
    assert kind == "low-rank" or max(before.values()) < 0.1


def test_joint_answers_are_those_of_the_trunk():
    with torch.no_grad():
        found, expected = (model(pixel_values=IMAGES).logits for model in (merged(1.5), merged(1.0)))
        assert torch.equal(found, expected)


def test_a_saved_model_computes_the_same_and_tells_its_size(tmp_path: Path):
    model = merged(1.2)
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        for task in ("a", "b", None):
            found, expected = (it(pixel_values=IMAGES, task=task).logits for it in (again, model))
            assert torch.equal(found, expected)
    bare, kept = residue_bytes(again)
    assert f"makes the model {1 + kept / bare:.3f} times as large" in (tmp_path / "m" / "README.md").read_text()
    assert MergeConfig.from_pretrained(tmp_path / "m").residues.size == 1.2
    assert MergeConfig.of(residues=1.3).residues.size == 1.3


def test_statistics_batch_norm_keeps_are_a_tasks_own_as_well():
    pair = dict(zip("ab", tiny.pair("resnet-basic"), strict=True))
    for seed, model in enumerate(pair.values()):
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(seed)) + 0.5)
    model = merge(pair, method="weights", residues=2.0)
    with torch.no_grad():
        for task, expert in pair.items():
            expected = expert(pixel_values=IMAGES).logits
            error = (model(pixel_values=IMAGES, task=task).logits - expected).norm() / expected.norm()
            assert error < 0.05


# The budget.


def task_tensor(residue: Tensor, own: Tensor, gram: Tensor) -> TaskTensor:
    return TaskTensor("a", "trunk.x.weight", own - residue, own, own, gram)


def test_bytes_go_where_they_gain_most():
    """As little is left as by any other choice that costs as much."""
    gram = draw(9, 5, seed=9).T @ draw(9, 5, seed=9) / 9
    found = [task_tensor(scale * draw(8, 5, seed=i), draw(8, 5, seed=10 + i), gram)
             for i, scale in enumerate((1.0, 0.5, 0.1))]  # fmt: skip
    gains = [[gain for _, gain in Signs.steps(tensor)] for tensor in found]
    cost = next(Signs.steps(found[0]))[0]
    for count in (1, 2, 4, 7):
        taken = spend([Signs.steps(tensor) for tensor in found], count * cost + 1)
        assert sum(taken) == count
        best = max(
            sum(sum(own[:n]) for own, n in zip(gains, numbers, strict=True))
            for numbers in product(range(9), repeat=3) if sum(numbers) == count
        )  # fmt: skip
        assert sum(sum(own[:n]) for own, n in zip(gains, taken, strict=True)) == pytest.approx(best)


def test_low_rank_is_the_best_in_the_metric_of_the_inputs():
    x = draw(30, 5, seed=3) @ draw(5, 5, seed=4)
    residue, own = draw(8, 5), draw(8, 5, seed=1)
    tensor = task_tensor(residue, own, x.T @ x / 30)
    u, s, v = factors(tensor)
    torch.testing.assert_close((u * s) @ v, residue, rtol=1e-6, atol=1e-6)
    kept = (u[:, :2] * s[:2]) @ v[:2]
    a, b, c = torch.linalg.svd(residue @ x.T, full_matrices=False)
    torch.testing.assert_close(kept @ x.T, (a[:, :2] * b[:2]) @ c[:2], rtol=1e-6, atol=1e-6)
    gains = [gain for _, gain in LowRank.steps(tensor)]
    left = tensor.energy(residue) - tensor.energy(residue - kept)
    assert sum(gains[:2]) == pytest.approx(left)


@pytest.mark.parametrize(
    ("residues", "message"),
    [
        (1.0, "residues' size is 1.0; it is a multiple of the merged model's own, above 1"),
        ({"size": 1.1, "kind": "lowrank"}, "There is no kind of residue named 'lowrank'; did you mean 'low-rank'"),
        ({"sise": 1.1}, "size"),
    ],
)
def test_settings_out_of_range_are_told(residues: object, message: str):
    with pytest.raises(RecipeError, match=message):
        MergeConfig(residues=residues)


def test_a_refit_leaves_nothing_that_residues_could_be_added_to():
    with pytest.raises(RecipeError, match="leave refit or residues out"):
        MergeConfig(method="permute", refit=True, residues=1.1)
    assert plan(experts(), residues=1.1).config.refit is None  # `auto` knows
