"""`merge` beyond the invariants: where experts come from, moments that are kept, labels, sizes and devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_zipit import evaluate, merge, observe, plan
from hf_zipit.errors import DataError, ExpertError
from hf_zipit.observation import Moments

from . import tiny
from .test_invariants import calibration

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Counted:
    """Calibration batches that count how often they are read."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from IMAGES.split(8)


def experts(labels: tuple[int, int] = (3, 4)) -> dict[str, Any]:
    return dict(zip(("clothes", "shoes"), tiny.pair("vit", labels=labels), strict=True))


def logits(model: torch.nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=IMAGES[:4], **kwargs).logits


def assert_bit_identical(one: torch.nn.Module, two: torch.nn.Module) -> None:
    left, right = one.state_dict(), two.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_experts_from_folders(tmp_path: Path):
    models = experts()
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    folders = {"clothes": tmp_path / "clothes", "shoes": str(tmp_path / "shoes")}
    result = merge(folders, IMAGES, depth=0.5)
    assert_bit_identical(result, merge(models, IMAGES, depth=0.5))
    found = {task: origin["model"] for task, origin in result.config.method["experts"].items()}
    assert found == {task: str(folder) for task, folder in folders.items()}
    result.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(result))


def test_config_says_how_it_was_made():
    settings = {"options": {"beta": 0.5}, "residual": "identity", "overrides": {"*.fc1": "permute"}, "seed": 3}
    result = merge(experts(), IMAGES, method="zip", depth="vit.layers.1", **settings)
    method = json.loads(json.dumps(result.config.method))
    assert method | settings | {"overrides": [{"*.fc1": "permute"}]} == method
    assert (method["method"], method["combine"], method["depth"]) == ("zip", "average", "vit.layers.1")
    assert (result.config.depth, result.config.cut) == (0.5, "vit.layers.1")


def test_labels():
    assert merge(experts((3, 4)), IMAGES).config.num_labels == 7
    named = experts((3, 3))
    for model in named.values():
        model.config.id2label = {0: "cat", 1: "dog", 2: "eel"}
    result = merge(named, IMAGES)
    assert result.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert logits(result).shape == (4, 3)


def test_moments_are_kept_and_serve_again(tmp_path: Path):
    models, data, path = experts(), Counted(), tmp_path / "new folder" / "moments.safetensors"
    observe(plan(models, method="zip"), data).save(path)
    assert data.passes == 1
    again = merge(models, data, method="zip", moments=path)
    also = merge(models, data, method="zip", moments=Moments.load(path))
    assert data.passes == 1
    result = merge(models, data, method="zip")
    assert data.passes == 2
    assert_bit_identical(again, result)
    assert_bit_identical(also, result)


def test_moments_serve_shallower_merges(tmp_path: Path):
    models, path = experts(), tmp_path / "moments.safetensors"
    settings = {"method": "zip", "row_fraction": 1.0}
    observe(plan(models, **settings), IMAGES).save(path)
    size = path.stat().st_size
    for depth in (0.0, 0.5):
        fresh = merge(models, IMAGES, depth=depth, **settings)
        assert_bit_identical(merge(models, depth=depth, moments=path, **settings), fresh)
    shallow = tmp_path / "shallow.safetensors"
    observe(plan(models, method="zip", depth=0.5), IMAGES).save(shallow)
    assert shallow.stat().st_size < size
    with pytest.raises(DataError, match="less depth"):
        merge(models, method="zip", moments=shallow)


@pytest.mark.parametrize("loaded", [False, True])
def test_moments_of_other_experts(tmp_path: Path, loaded: bool):
    models, path = experts(), tmp_path / "moments.safetensors"
    observe(plan(models, method="zip"), IMAGES).save(path)
    moments = Moments.load(path) if loaded else path
    with pytest.raises(DataError, match="other experts: the weights of \\['shoes'\\]"):
        merge(models | {"shoes": tiny.build("vit", 7, num_labels=4)}, method="zip", moments=moments)
    with pytest.raises(DataError, match="are of the tasks"):
        merge({"clothes": models["clothes"], "hats": models["shoes"]}, method="zip", moments=moments)
    swapped, there = (
        merge(named, method="zip", moments=moments) for named in (dict(reversed(models.items())), models)
    )
    torch.testing.assert_close(logits(swapped, task="shoes"), logits(there, task="shoes"))


def test_under_an_accelerator_of_the_user():
    accelerator = Accelerator(cpu=True)
    models = experts()
    result = merge(models, IMAGES, accelerator=accelerator)
    assert_bit_identical(result, merge(models, IMAGES))


def test_methods_without_moments_read_no_data():
    data = Counted()
    assert plan(experts(), method="identity").passes == 0
    assert plan(experts(), depth=0.0).passes == 0
    assert plan(experts(), method="identity", overrides={"*.fc1": "permute"}).passes == 1
    merge(experts(), data, method="identity")
    merge(experts(), data, depth=0.0)
    assert data.passes == 0


@pytest.mark.parametrize(
    ("refit", "depth", "name"),
    tiny.mostly_seldom(product([False, True], [1.0, 0.5, 0.0], ["vit", "bert-masked", "clip", "resnet-basic"])),
)
def test_a_plan_knows_the_size_of_the_merge(name: str, depth: float, refit: bool):
    models = dict(zip("ab", tiny.pair(name), strict=True))
    settings = {"method": "identity", "depth": depth, "refit": refit}
    merged = merge(models, calibration(models["a"]), **settings)
    parameters = plan(models, **settings).parameters
    assert parameters["merged"] == parameters["trunk"] + parameters["branches"] == merged.num_parameters()


def test_wider_trunk_is_saved_and_loaded(tmp_path: Path):
    """k > d merged units: every unit of both experts' first MLP is kept apart, so that this layer loses nothing."""
    name = "vit.layers.0.mlp.fc1"
    overrides = {name: {"method": "zip", "size": 128}}
    result = merge(experts(), IMAGES, method="permute", overrides=overrides)
    assert result.trunk.get_submodule(name).weight.shape == (128, 32)
    result.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(result))


def test_coarse_experts_are_merged_in_float32():
    models = {task: model.to(torch.bfloat16) for task, model in experts().items()}
    fine = {task: model.to(torch.float32) for task, model in experts().items()}
    for task, model in fine.items():
        model.load_state_dict(models[task].state_dict())
    coarse = merge(models, IMAGES, method="identity")
    assert {tensor.dtype for tensor in coarse.parameters()} == {torch.float32}
    assert_bit_identical(coarse, merge(fine, IMAGES, method="identity"))


def test_experts_in_a_list_are_named_by_their_folders(tmp_path: Path):
    models = experts()
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    merged = merge([tmp_path / "clothes", str(tmp_path / "shoes")], method="identity")
    assert merged.config.tasks == ["clothes", "shoes"]
    with pytest.raises(ExpertError, match="has no name; name the experts' tasks"):
        merge([tiny.build("vit"), tiny.build("vit")], method="identity")


def test_evaluating_takes_folders(tmp_path: Path):
    models = experts()
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    merge(models, method="identity").save_pretrained(tmp_path / "merged")
    rows = {task: [{"pixel_values": image, "labels": 0} for image in IMAGES] for task in models}
    folders = {task: tmp_path / task for task in models}
    found = evaluate(tmp_path / "merged", rows, folders)
    assert found == evaluate(merge(models, method="identity"), rows, models)
    assert found == evaluate(str(tmp_path / "merged"), rows, list(folders.values()))


def test_a_config_can_be_read():
    shown = repr(merge(experts(), IMAGES).config)
    assert len(shown.splitlines()) < 20 and "ViTForImageClassification" in shown and "permute" in shown
