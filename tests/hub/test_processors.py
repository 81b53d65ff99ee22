"""Image processors and tokenizers travel with a merged model as files: once if they are equal, else per task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BertTokenizer, ViTImageProcessorPil

import hf_zipit
from hf_zipit.hub.processors import processor_files, same, together
from hf_zipit.running.saved import load_merged
from tests import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]


def image_processor(size: int) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def tokenizer(words: list[str]) -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def experts(room: Path, sizes: tuple[int, ...]) -> dict[str, Path]:
    for index, size in enumerate(sizes):
        tiny.build("vit", index, num_labels=2 + index).save_pretrained(room / f"task {index}")
        if size:
            image_processor(size).save_pretrained(room / f"task {index}")
    return {f"task {index}": room / f"task {index}" for index in range(len(sizes))}


def merged(room: Path, sizes: tuple[int, ...], **settings):
    return hf_zipit.merge(experts(room, sizes), method="identity", **settings)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*pro*") if path.is_file()}


def test_equal_processors_are_saved_once(tmp_path: Path):
    merged(tmp_path, (16, 16)).save_pretrained(tmp_path / "both")
    assert names(tmp_path / "both") == {"preprocessor_config.json"}
    assert AutoImageProcessor.from_pretrained(tmp_path / "both").size["height"] == 16


def test_different_processors_are_saved_per_task_and_the_card_says_so(tmp_path: Path):
    merged(tmp_path, (16, 20)).save_pretrained(tmp_path / "both")
    folders = {"task 0": ("processors/task_0", 16), "task 1": ("processors/task_1", 20)}
    assert names(tmp_path / "both") == {f"{folder}/preprocessor_config.json" for folder, _ in folders.values()}
    card = (tmp_path / "both" / "README.md").read_text()
    for task, (folder, size) in folders.items():
        assert AutoImageProcessor.from_pretrained(tmp_path / "both", subfolder=folder).size["height"] == size
        assert f"{task} in `{folder}`" in card
    # A model that was loaded brings them along, also into a folder that had others.
    again = load_merged(str(tmp_path / "both"))
    for _ in range(2):
        again.save_pretrained(tmp_path / "again")
    assert processor_files(tmp_path / "again") == processor_files(tmp_path / "both")
    third = hf_zipit.merge({"x": tmp_path / "both", "y": tmp_path / "task 0"}, method="identity")
    assert {name.split("/")[1] for name in third.processor_files()} == {"x_task_0", "x_task_1", "y"}


def test_an_expert_without_a_processor_does_not_count(tmp_path: Path):
    merged(tmp_path, (16, 0)).save_pretrained(tmp_path / "both")
    assert names(tmp_path / "both") == {"preprocessor_config.json"}
    merged(tmp_path / "none", (0, 0)).save_pretrained(tmp_path / "bare")
    assert not names(tmp_path / "bare")


def test_the_processor_that_the_user_gave_is_the_models(tmp_path: Path):
    merged(tmp_path, (16, 20), processor=image_processor(24)).save_pretrained(tmp_path / "both")
    assert AutoImageProcessor.from_pretrained(tmp_path / "both").size["height"] == 24


def test_tokenizers_are_compared_by_what_they_do(tmp_path: Path):
    tokenizer(WORDS).save_pretrained(tmp_path / "a")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")  # remembers that it was loaded
    tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "c")
    a, b, c = (processor_files(tmp_path / name) for name in "abc")
    assert a != b and same(a, b) and not same(a, c)
    assert together({"x": a, "y": b}, {"x": "x", "y": "y"}) == a
    assert set(together({"x": a, "y": c}, {"x": "x", "y": "y"})) == {
        f"processors/{task}/{name}" for task in "xy" for name in ("tokenizer.json", "tokenizer_config.json")
    }
    changed = json.loads(a["tokenizer_config.json"]) | {"do_lower_case": False}
    assert not same(a, {**a, "tokenizer_config.json": json.dumps(changed).encode()})


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path):
    tiny.build("bert").save_pretrained(tmp_path / "bert")
    assert processor_files(tmp_path / "bert") == {}
    assert processor_files(None) == {} and processor_files("no/such-repo-here") == {}


@torch.no_grad()
def test_saving_over_a_model_with_processors_per_task_leaves_none_behind(tmp_path: Path):
    merged(tmp_path / "two", (16, 20)).save_pretrained(tmp_path / "both")
    merged(tmp_path / "one", (16, 16)).save_pretrained(tmp_path / "both")
    assert names(tmp_path / "both") == {"preprocessor_config.json"}


@pytest.mark.parametrize("damaged", ["{", ""])
def test_a_damaged_configuration_is_compared_as_it_is(damaged: str):
    assert same({"a_config.json": damaged.encode()}, {"a_config.json": damaged.encode()})
    assert not same({"a_config.json": damaged.encode()}, {"a_config.json": b"{}"})
