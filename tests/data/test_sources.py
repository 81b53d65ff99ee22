"""Calibration data: every kind gives the same batches, in a fixed order, or one clear sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError
from tests.observation.models import MLP, bert, vit

TASKS = ("clothes", "shoes")
X = torch.arange(50.0).reshape(10, 5)


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": X[index], "label": index}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((row, 0) for row in X)


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": X.tolist(), "label": list(range(10)), "id": [str(i) for i in range(10)]})


KINDS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "numpy array, float64": lambda: X.double().numpy(),
    "dict of tensors": lambda: {"x": X, "labels": torch.arange(10)},
    "dict of lists": lambda: {"x": X.tolist(), "other": list("abcdefghij")},
    "list of samples": lambda: [{"x": row, "label": 1} for row in X],
    "list of lists": lambda: [{"x": row} for row in X.tolist()],
    "list of tensors": lambda: list(X),
    "torch dataset": Samples,
    "torch tuples": lambda: TensorDataset(X, torch.arange(10)),
    "torch iterable dataset": Stream,
    "Dataset": rows,
    "Dataset with torch format": lambda: rows().with_format("torch"),
    "IterableDataset": lambda: rows().to_iterable_dataset(),
    "DataLoader": lambda: DataLoader(TensorDataset(X, torch.arange(10)), batch_size=4),
    "DataLoader, larger batches": lambda: DataLoader(Samples(), batch_size=8),
    "iterable of batches": lambda: ({"x": part, "labels": part} for part in X.split(4)),
    "iterable of tuples": lambda: ((part, 0) for part in X.split(8)),
    "iterable of tensors": lambda: iter(X.split(4)),
}


def read(data: Any, model: nn.Module | None = None, **options: Any) -> list[tuple[str | None, dict[str, Tensor]]]:
    calibration = Calibration(data, **{"batch_size": 4, **options}).read(dict.fromkeys(TASKS, model or MLP()))
    return [(batch.task, batch.inputs) for batch in calibration.batches()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_samples(kind: str):
    batches = read(KINDS[kind]())
    assert all(task is None and list(inputs) == ["x"] and len(inputs["x"]) <= 4 for task, inputs in batches)
    assert torch.equal(torch.cat([inputs["x"] for _, inputs in batches]), X)
    assert batches[0][1]["x"].dtype == torch.float32


def test_lists_of_batches_and_of_samples_are_told_apart():
    pixels = torch.randn(6, 3, 8, 8)
    for data in (list(pixels), list(pixels.split(3)), [{"pixel_values": part} for part in pixels.split(4)]):
        batches = read(data, vit(0))
        assert torch.equal(torch.cat([inputs["pixel_values"] for _, inputs in batches]), pixels)


def test_tasks_take_turns():
    batches = read({"shoes": X[:2] + 100, "clothes": X}, batch_size=2)
    assert [task for task, _ in batches] == ["clothes", "shoes"] + ["clothes"] * 4
    assert torch.equal(batches[1][1]["x"], X[:2] + 100)


def test_shuffling_loaders_keep_one_order_and_leave_the_generator_alone():
    loader, model = DataLoader(TensorDataset(X), batch_size=4, shuffle=True), MLP()
    state = torch.get_rng_state()
    first = torch.cat([inputs["x"] for _, inputs in read(loader, model)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = torch.cat([inputs["x"] for _, inputs in read(loader, model)])
    assert torch.equal(first, second) and not torch.equal(first, X)
    assert torch.equal(first.sort(0).values, X)


def test_batches_are_prepared_only_when_read():
    loaded: list[int] = []

    class Counting(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            loaded.append(index)
            return super().__getitem__(index)

    batches = Calibration(Counting(), batch_size=4).read(dict.fromkeys(TASKS, MLP())).batches()
    assert not [i for i in loaded if i > 0]  # one look at the first, to tell samples from batches
    loaded.clear()
    assert batches[1].samples == 4 and torch.equal(batches[1].inputs["x"], X[4:8])
    assert batches[1].inputs["x"] is batches[1].inputs["x"]
    assert loaded == [4, 5, 6, 7]  # once, however often it is read


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_go_through_the_processor(mode: str):
    generator = np.random.default_rng(0)
    shape = (12, 10, 3) if mode == "RGB" else (12, 10)
    images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode) for _ in range(5)]
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    expected = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    dataset = datasets.Dataset.from_dict({"img": images, "label": [0] * 5}).cast_column("img", datasets.Image())
    for data in (dataset, {"image": images}, images, [{"image": image, "label": 1} for image in images]):
        batches = read(data, vit(0), processor=processor)
        assert torch.equal(torch.cat([inputs["pixel_values"] for _, inputs in batches]), expected)
        assert all(set(inputs) == {"pixel_values"} for _, inputs in batches)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def test_texts_and_ragged_tokens_are_padded_per_batch():
    texts, ids = ["a b c", "b", "c c", "a"], [[2, 3, 4], [3], [4, 4], [2]]
    for data in (datasets.Dataset.from_dict({"text": texts}), texts, [{"text": text} for text in texts]):
        batches = read(data, bert(0), processor=tokenizer(), batch_size=2)
        assert [inputs["input_ids"].tolist() for _, inputs in batches] == [[[2, 3, 4], [3, 0, 0]], [[4, 4], [2, 0]]]
        assert [inputs["attention_mask"].tolist() for _, inputs in batches] == [
            [[1, 1, 1], [1, 0, 0]],
            [[1, 1], [1, 0]],
        ]
    for data in (datasets.Dataset.from_dict({"input_ids": ids}), [{"input_ids": row} for row in ids]):
        batches = read(data, bert(0), batch_size=2)
        assert batches[0][1]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batches[0][1]["input_ids"].dtype == torch.int64
    masked = {"attention_mask": [[1, 1, 0], [1]], "input_ids": [[2, 3, 4], [3]]}
    assert read(masked, bert(0))[0][1]["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert "attention_mask" not in read(torch.ones(2, 3, dtype=torch.int32), bert(0))[0][1]


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "no calibration data"),
    "an empty tensor": (X[:0], "empty"),
    "an empty list": ([], "empty"),
    "an empty iterable": (iter(()), "empty"),
    "an empty task": ({"clothes": X, "shoes": []}, "'shoes'.*empty"),
    "an unknown task": ({"clothes": X, "hats": X}, r"hats.*\['clothes', 'shoes'\]"),
    "only unknown tasks": ({"train": X, "test": X}, r"train.*\['clothes', 'shoes'\]"),
    "a missing task": ({"clothes": X}, "shoes"),
    "other columns": ({"clothes": [{"foo": 1}], "shoes": X}, r"'clothes'.*\['foo'\].*reads x"),
    "columns of different length": ({"x": X, "attention_mask": X[:3]}, "'x': 10, 'attention_mask': 3"),
    "samples of different shape": ([{"x": torch.ones(2, 3)}, {"x": torch.ones(3, 3)}], "'x'.*no tensor"),
    "strings for tensors": ({"x": ["a", "b"]}, "'x'.*no tensor"),
    "a number": (3, "int"),
    "a path": ("images/", "str"),
    "batches of numbers": (iter([1, 2]), "int"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_told_in_one_sentence(kind: str):
    data, message = BAD[kind]
    with pytest.raises(DataError, match=message) as told:
        read(data)
    assert "\n" not in str(told.value)


def test_a_processor_of_the_wrong_kind_is_told():
    with pytest.raises(DataError, match="reads pixel_values.*'image' or 'text' column"):
        read({"image": [Image.new("RGB", (8, 8))]}, vit(0), processor=tokenizer())
    with pytest.raises(DataError, match="ViTImageProcessor.* cannot prepare"):
        read({"image": ["no image"]}, vit(0), processor=ViTImageProcessor())
    with pytest.raises(DataError, match="batch size"):
        read(X, batch_size=0)
