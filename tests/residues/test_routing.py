"""The router: which task a sample is of, found from what the trunk makes of it."""

from __future__ import annotations

import copy
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_zipit import merge
from hf_zipit.errors import DataError, ZipItError
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.modeling.router import features_of
from hf_zipit.residues.routers.discriminant import RIDGE, discriminant
from tests import tiny


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(seed: int) -> dict[str, Tensor]:
    """Of task a bright and of task b brighter ones, as many as are told apart by nothing else."""
    noise = draw(24, 3, 16, 16, seed=seed).float()
    return {"a": noise[:12] + 1, "b": noise[12:] + 3}


@cache
def merged() -> nn.Module:
    experts = dict(zip("ab", tiny.pair("vit"), strict=True))
    return merge(experts, images(0), method="permute", residues={"kind": "t-switch", "router": True})


@torch.no_grad()
def logits(model: nn.Module, task: object, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels, task=task).logits


def test_every_sample_is_answered_by_the_task_that_is_found_for_it():
    model, new = merged(), images(1)
    mixed = torch.cat([new["a"][:5], new["b"][:3], new["a"][5:7]])
    assert model.route({"pixel_values": mixed}) == list("aaaaabbbaa")
    assert torch.equal(logits(model, "auto", mixed), logits(model, list("aaaaabbbaa"), mixed))
    alone = logits(model, "auto", new["a"])  # all of one task: still the classes of all
    own = logits(model, "a", new["a"])
    torch.testing.assert_close(alone[:, : own.shape[1]], own, rtol=1e-5, atol=1e-6)
    assert alone[:, own.shape[1] :].max() < -1e30


def test_labels_are_each_tasks_own():
    model, new = merged(), images(1)
    mixed, labels = torch.cat([new["a"][:2], new["b"][:2]]), torch.tensor([0, 1, 1, 0])
    found = model(pixel_values=mixed, labels=labels, task="auto").loss
    rows = torch.cat([logits(model, task, new[task][:2]).log_softmax(-1)[[0, 1], labels[at : at + 2]]
                      for task, at in (("a", 0), ("b", 2))])  # fmt: skip
    torch.testing.assert_close(found.detach(), -rows.mean(), rtol=1e-4, atol=1e-5)


def test_a_saved_router_and_a_copied_one_find_the_same(tmp_path: Path):
    model, new = merged(), torch.cat(list(images(2).values()))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, "auto", new), logits(model, "auto", new))
    twin = copy.deepcopy(model)
    twin.router.weight.neg_()
    twin.router.bias.neg_()
    assert set(twin.route({"pixel_values": images(2)["a"]})) == {"b"}
    assert set(model.route({"pixel_values": images(2)["a"]})) == {"a"}
    weights = sum(tensor.numel() for tensor in model.router.buffers())
    assert residue_bytes(model)[1] == sum(b.nbytes for b in model.residues.buffers()) + 4 * weights


def test_looking_for_the_task_ends_no_other_pass():
    """Threads that run one model do not see each other's forward passes end."""
    model, new = merged(), torch.cat(list(images(3).values()))
    expected, failures = logits(model, None, new), []

    def jointly() -> None:
        try:
            for _ in range(5):
                assert torch.equal(logits(model, None, new), expected)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=jointly)
    thread.start()
    for _ in range(5):
        model.route({"pixel_values": new})
    thread.join()
    assert not failures


def test_the_discriminant_is_fishers():
    rows = [draw(30, 4, seed=1) + 1, draw(50, 4, seed=2), draw(40, 4, seed=3) - 1]
    weight, bias = discriminant(rows)
    covariances = [torch.cov(x.T, correction=0) for x in rows]
    within = sum(covariances) / 3
    within = within + RIDGE * within.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    inverse = torch.linalg.inv(within)
    for x in draw(20, 4, seed=4):
        # Up to what all tasks have in common: minus half the squared distance to the task's mean.
        distances = torch.stack([(x - y.mean(0)) @ inverse @ (x - y.mean(0)) for y in rows])
        found = weight @ x + bias
        torch.testing.assert_close(found - found[0], -(distances - distances[0]) / 2, rtol=1e-9, atol=1e-9)


def test_padding_does_not_count():
    x, mask = draw(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = features_of(x, mask)
    expected = torch.cat([x[0, :3].mean(0), x[0, :3].std(0, correction=0)]).float()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    picture = draw(2, 3, 4, 4)
    torch.testing.assert_close(features_of(picture)[:, :3], picture.mean((2, 3)).float(), rtol=1e-5, atol=1e-6)


def test_what_a_router_needs_is_told():
    experts = dict(zip("ab", tiny.pair("vit"), strict=True))
    for data in (None, images(0)["a"]):
        with pytest.raises(DataError, match="give calibration data by task"):
            merge(experts, data, method="weights", residues={"kind": "emr", "router": True})
    plain = merge(experts, method="weights", residues="emr")
    with pytest.raises(ZipItError, match="The task 'auto' is unknown"):
        logits(plain, "auto", images(0)["a"])
