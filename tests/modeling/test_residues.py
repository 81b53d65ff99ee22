"""Residues as the merged model holds them: packed, put in while a task runs alone, and taken out again."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from hf_zipit import merge
from hf_zipit.errors import ExpertError, ZipItError
from hf_zipit.modeling.kinds.low_rank import LowRank
from hf_zipit.modeling.kinds.signs import Signs
from hf_zipit.modeling.residue import Dense
from tests import tiny

FC1 = "trunk.vit.layers.0.mlp.fc1.weight"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 5), (8,), (2, 3, 2, 2)])
def test_planes_of_signs_are_the_signs_and_mean_magnitudes_of_what_is_left(shape: tuple[int, ...]):
    tensor, planes = draw(*shape), Signs(shape, 3)
    assert planes.bits.shape == (3, -(-tensor.numel() // 8))
    left, expected = tensor.double(), torch.zeros(shape).double()
    for _ in range(3):
        plane = left.abs().mean() * torch.where(left >= 0, 1.0, -1.0)
        expected, left = expected + plane, left - plane
    torch.testing.assert_close(planes.set(tensor).tensor().double(), expected, rtol=1e-6, atol=1e-6)


def test_factors_and_vectors_are_kept_in_half_precision():
    left, right = draw(6, 2), draw(2, 12, seed=1)
    found = LowRank((6, 3, 2, 2), 2).set(left, right).tensor()
    torch.testing.assert_close(found, (left @ right).reshape(6, 3, 2, 2), rtol=1e-2, atol=1e-2)
    assert torch.equal(Dense((7,)).set(draw(7)).tensor(), draw(7).half().float())
    cast = LowRank((6, 12), 2).set(left, right).to(torch.bfloat16)
    torch.testing.assert_close(cast.tensor(), LowRank((6, 12), 2).set(left, right).tensor(), rtol=0, atol=0)


@cache
def merged() -> torch.nn.Module:
    return merge(dict(zip("ab", tiny.pair("vit"), strict=True)), method="identity")


def with_one(kind: str = "dense") -> tuple[torch.nn.Module, Tensor]:
    """The model with a residue of one matrix for task b, and that matrix."""
    model, own = copy.deepcopy(merged()), draw(64, 32, seed=4)
    (residue,) = model.add_residues(
        [{"task": "b", "tensor": FC1.removeprefix("trunk."), "shape": [64, 32], "kind": kind, "size": 2}]
    )
    residue.set(own)
    return model, residue.tensor()


@torch.no_grad()
def logits(model: torch.nn.Module, task: str | None) -> Tensor:
    return model(pixel_values=draw(3, 3, 16, 16), task=task).logits


def test_a_residue_is_added_where_its_task_runs_alone_and_nowhere_else():
    model, own = with_one()
    assert torch.equal(logits(model, "a"), logits(merged(), "a"))
    assert torch.equal(logits(model, None), logits(merged(), None))
    by_hand = copy.deepcopy(merged())
    by_hand.get_parameter(FC1).data += own
    assert torch.equal(logits(model, "b"), logits(by_hand, "b"))
    assert torch.equal(model.get_parameter(FC1), merged().get_parameter(FC1))
    assert isinstance(model.get_parameter(FC1), torch.nn.Parameter)
    twin = copy.deepcopy(model)
    next(twin.residues.buffers()).zero_()
    assert torch.equal(logits(twin, "b"), logits(merged(), "b"))
    assert torch.equal(logits(model, "b"), logits(by_hand, "b"))


def test_the_merged_weights_come_back_after_an_error():
    model, _ = with_one()
    fc1 = model.trunk.get_submodule("vit.layers.0.mlp.fc1")

    def fails(*_: object) -> None:
        raise RuntimeError("stop")

    handle = fc1.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="stop"):
        logits(model, "b")
    handle.remove()
    twin = copy.deepcopy(model)
    twin.residues[0]["b"]["weight"].values = torch.zeros(3, 3, dtype=torch.int16)  # a damaged one
    with pytest.raises(RuntimeError, match="must match"):
        logits(twin, "b")
    assert torch.equal(logits(twin, "a"), logits(merged(), "a"))
    assert torch.equal(model.get_parameter(FC1), merged().get_parameter(FC1))
    assert torch.equal(logits(model, "a"), logits(merged(), "a"))


def test_training_a_task_moves_the_merged_weights():
    model, _ = with_one("signs")
    model(pixel_values=draw(2, 3, 16, 16), task="b", labels=torch.tensor([0, 1])).loss.backward()
    assert model.get_parameter(FC1).grad.abs().sum() > 0


def test_what_does_not_fit_is_told():
    model = copy.deepcopy(merged())
    setting = {"task": "b", "tensor": "vit.layers.9.weight", "shape": [2], "kind": "dense", "size": 1}
    with pytest.raises(ZipItError, match="'vit.layers.9', which is not a module"):
        model.add_residues([setting])
    model = copy.deepcopy(merged())
    with pytest.raises(ZipItError, match="no kind or no task"):
        model.add_residues([{**setting, "kind": "sparse"}])
    model, _ = with_one()
    with pytest.raises(ZipItError, match="has residues already"):
        model.add_residues([setting])
    with pytest.raises(ExpertError, match="it has residues per task"):
        model.expert("b")
