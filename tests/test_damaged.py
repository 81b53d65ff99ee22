"""A checkpoint that is not whole is refused by name, not filled up with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

import hf_zipit
from hf_zipit.errors import ExpertError
from hf_zipit.modeling import ZipItForImageClassification
from hf_zipit.running.saved import load_merged

from .tiny import build, pair

Tensors = dict[str, Tensor]


def without_one(tensors: Tensors) -> None:
    del tensors[next(name for name in tensors if "layer" in name)]


def with_one_more(tensors: Tensors) -> None:
    tensors["vit.nobody.knows"] = torch.zeros(2)


def with_another_shape(tensors: Tensors) -> None:
    name = next(name for name in tensors if "layer" in name)
    tensors[name] = torch.zeros(3, 3)


def of_dtype(dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if "layer" in name)
        tensors[name] = (10 * tensors[name]).to(dtype)

    return change


DAMAGE: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (without_one, "lacks the tensor vit"),
    "unexpected": (with_one_more, "has the tensor vit.nobody.knows, which its class does not know"),
    "mismatched": (with_another_shape, "shape"),
    "integers": (of_dtype(torch.int8), "has no real numbers .* in the tensor vit"),
    "truth values": (of_dtype(torch.bool), "has no real numbers .* in the tensor vit"),
    "complex": (of_dtype(torch.complex64), "has no real numbers .* in the tensor vit"),
}


def damaged(folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_expert_is_refused(tmp_path: Path, kind: str) -> None:
    change, sentence = DAMAGE[kind]
    build("vit").save_pretrained(tmp_path / "bad")
    with pytest.raises(ExpertError, match=sentence) as error:
        hf_zipit.plan({"good": build("vit", 1), "bad": damaged(tmp_path / "bad", change)}, method="identity")
    assert "'bad'" in str(error.value)


@pytest.mark.parametrize("name", ["vit", "bert-masked", "gpt2", "clip", "roberta-masked", "llama"])
def test_a_whole_one_is_taken(tmp_path: Path, name: str) -> None:
    build(name).save_pretrained(tmp_path / "good")
    hf_zipit.plan({"good": tmp_path / "good", "other": build(name, 1)}, method="identity")


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_damaged_merged_model_is_refused(tmp_path: Path, kind: str) -> None:
    change = {"missing": without_one, "unexpected": with_one_more}[kind]
    hf_zipit.merge(dict(zip("ab", pair("vit"), strict=True)), method="identity").save_pretrained(tmp_path / "merged")
    folder = str(damaged(tmp_path / "merged", change))
    classes = (ZipItForImageClassification, AutoModelForImageClassification)
    for load in (load_merged, *(each.from_pretrained for each in classes)):
        with pytest.raises(ExpertError, match="is damaged"):
            load(folder)
