"""Raw images and texts are prepared by the experts' own processor where none is given, from Python as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import hf_zipit
from hf_zipit.errors import DataError

from .. import tiny
from ..processors import image_processor, tokenizer

TASKS = ("a", "b")


def saved(name: str, processor, folder) -> dict[str, str]:
    for task, model in zip(TASKS, tiny.pair(name), strict=True):
        model.save_pretrained(folder / task)
        processor.save_pretrained(folder / task)
    return {task: str(folder / task) for task in TASKS}


def pictures() -> Dataset:
    noise = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    return Dataset.from_dict({"image": [Image.fromarray(one) for one in noise], "labels": [i % 3 for i in range(8)]})


def test_images_and_texts_go_through_what_was_saved_with_the_experts(tmp_path):
    experts, data = saved("vit", image_processor(), tmp_path), pictures()
    by_itself = hf_zipit.merge(experts, data, refit=False)
    given = hf_zipit.merge(experts, data, refit=False, processor=image_processor())
    tensors = zip(by_itself.state_dict().items(), given.state_dict().values(), strict=True)
    assert all(torch.equal(own, other) for (_, own), other in tensors)
    tests = dict.fromkeys(TASKS, data)
    found = hf_zipit.evaluate(by_itself, tests, experts)
    assert found.model == hf_zipit.evaluate(by_itself, tests, processor=image_processor()).model
    by_itself.save_pretrained(tmp_path / "merged")
    assert hf_zipit.evaluate(tmp_path / "merged", tests, experts).to_dict() == found.to_dict()
    texts = saved("bert-sequence", tokenizer(), tmp_path / "texts")
    assert hf_zipit.merge(texts, ["the red boot", "a cap"] * 4, refit=False)


def test_without_one_the_error_says_what_is_missing():
    experts = dict(zip(TASKS, tiny.pair("vit"), strict=True))
    with pytest.raises(DataError, match="has the columns .*image.*processor"):
        hf_zipit.merge(experts, pictures())
