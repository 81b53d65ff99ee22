"""Calibration data is read once and serves every stage, keeps to its memory, and is told apart by its experts."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

from hf_zipit import Calibration, merge
from hf_zipit.errors import DataError
from tests import tiny
from tests.observation.models import MLP, bert

TASKS = ("clothes", "shoes")
X = torch.arange(90.0).reshape(18, 5)


def read(data: Any, model: nn.Module | None = None, **settings: Any) -> Calibration:
    return Calibration(data, **{"batch_size": 4, **settings}).read(dict.fromkeys(TASKS, model or MLP()))


# ---------------------------------------------------------------------------------------- read once, used by all


@cache
def experts() -> dict[str, nn.Module]:
    models = (tiny.build("vit", seed, num_labels=labels, num_hidden_layers=1) for seed, labels in ((0, 3), (1, 4)))
    return dict(zip(TASKS, models, strict=True))


@cache
def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {task: torch.randn(n, 3, 16, 16, generator=generator) for task, n in zip(TASKS, (18, 14), strict=True)}


class OnePass:
    """Batches that can be had once."""

    def __init__(self, pixels: Tensor) -> None:
        self.batches = iter(pixels.split(8))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        assert self.batches is not None, "read twice"
        batches, self.batches = self.batches, None
        return ({"pixel_values": batch} for batch in batches)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, pixels: Tensor) -> None:
        self.rows = iter(pixels)

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows


ONE_PASS = {
    "generator": lambda pixels: (batch for batch in pixels.split(8)),
    "one-pass iterable": OnePass,
    "torch iterable dataset": Stream,
    "IterableDataset": lambda pixels: datasets.IterableDataset.from_generator(
        lambda rows: ({"pixel_values": row} for row in rows), gen_kwargs={"rows": pixels}
    ),
}


def everything(data: Any) -> nn.Module:
    """The merge in which all stages read the data."""
    corrections = {"repair": {}, "rescale-shift": {"samples": 8}}
    return merge(
        experts(), data, method="zip", refit={"joint_heads": True, "micro_batch": 6}, corrections=corrections,
        batch_size=8,
    )  # fmt: skip


@cache
def from_tensors() -> dict[str, Tensor]:
    return dict(everything(images()).state_dict())


@pytest.mark.parametrize("kind", ONE_PASS)
def test_one_pass_data_serves_all_stages_of_a_merge(kind: str):
    found = everything({task: ONE_PASS[kind](pixels) for task, pixels in images().items()}).state_dict()
    assert any(name.startswith("rescales.") for name in found)
    assert found.keys() == from_tensors().keys()
    for name, tensor in from_tensors().items():
        assert torch.equal(found[name], tensor), name


def test_one_calibration_serves_many_merges():
    calibration = Calibration({task: OnePass(pixels) for task, pixels in images().items()}, batch_size=8)
    first, second = (merge(experts(), calibration, method=method) for method in ("permute", "zip"))
    for merged, method in ((first, "permute"), (second, "zip")):
        again = merge(experts(), images(), method=method, batch_size=8)
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in merged.state_dict().items())


def test_settings_beside_a_calibration_are_refused():
    with pytest.raises(DataError, match="batch_size is the Calibration's own"):
        merge(experts(), Calibration(images()), method="zip", batch_size=8)


# ------------------------------------------------------------------------------------------------------ memory


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("hf_zipit-*"))


def test_what_is_beyond_the_memory_goes_to_files_that_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = 3 * 4 * 5 * 4 / 2**30  # three of the five batches
    calibration = read({"x": X.double().numpy(), "labels": torch.arange(18)[:, None].expand(18, 5)}, memory_gb=room)
    assert not folders()
    batches = calibration.batches()
    for _ in range(2):
        assert torch.equal(torch.cat([batch.inputs["x"] for batch in batches]), X)
        assert [batch.columns()["labels"][0, 0].item() for batch in batches] == [0, 4, 8, 12, 16]
    (folder,) = folders()
    assert len(list(folder.iterdir())) == 2
    part = calibration.select({None: [17, 3]})
    assert torch.equal(part.whole(None)["x"], X[[17, 3]])
    del calibration
    gc.collect()
    assert folder.is_dir()  # its batches are still there
    del batches
    gc.collect()
    assert not folders()
    assert torch.equal(part.whole(None)["x"], X[[17, 3]])


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25])
@pytest.mark.parametrize("by_task", [False, True])
def test_numbers_that_no_model_computes_with_name_task_and_sample(value: float, by_task: bool):
    wrong = X.clone()
    wrong[10, 3] = value
    calibration = read({"clothes": X, "shoes": wrong} if by_task else wrong)
    where = " for the task 'shoes'" if by_task else ""
    with pytest.raises(DataError, match=rf"calibration data{where} \(number 2 of its batch\) holds .* in 'x'") as told:
        [batch.inputs for batch in calibration.batches()]
    assert "\n" not in str(told.value)
    assert f"{value:g}"[:4] in str(told.value)


@pytest.mark.parametrize("settings", [{"method": "zip"}, {"method": "identity", "corrections": ["repair"]},
                                      {"method": "identity", "refit": True}])  # fmt: skip
def test_no_stage_takes_such_numbers(settings: dict[str, Any]):
    damaged = {task: pixels.clone() for task, pixels in images().items()}
    damaged["shoes"][3, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"'shoes' \(number 3 of its batch\) holds nan in 'pixel_values'"):
        merge(experts(), damaged, **settings)


def test_large_numbers_are_data():
    assert read(X * 1e9).batches()[-1].inputs["x"].max() > 1e10
    with pytest.raises(DataError, match=r"number 1 of its batch\) holds inf in 'weight'"):
        Calibration({"x": X, "weight": torch.tensor([1.0, torch.inf] + [1.0] * 16)}).read(
            dict.fromkeys(TASKS, Weighted())
        ).batches()[0].columns()


class Weighted(MLP):
    """A number a sample beside its input."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().forward(x) * weight[:, None]


def test_what_was_read_for_some_experts_is_refused_by_others():
    calibration = read(X)
    assert calibration.read(dict.fromkeys(TASKS, MLP(seed=5))) is calibration
    with pytest.raises(DataError, match=r"for the tasks \['clothes', 'shoes'\] of MLP, .* \['clothes', 'hats'\]"):
        calibration.read(dict.fromkeys(("clothes", "hats"), MLP()))
    with pytest.raises(DataError, match="of MLP, and now is asked for .* of BertModel; make a Calibration for each"):
        calibration.read(dict.fromkeys(TASKS, bert(0)))


# -------------------------------------------------------------------------------------------------- regrouping


@pytest.mark.parametrize("size", [1, 3, 4, 7, 50])
def test_regrouped_samples_keep_their_order(size: int):
    calibration = read({"clothes": X, "shoes": X[:7] + 100})
    found = calibration.micro_batches(size)
    assert [batch.number for batch in found] == list(range(len(found)))
    assert {batch.size for batch in found} == {min(size, 18)}
    for number, expected in enumerate((X, X[:7] + 100)):
        own = [batch for batch in found if batch.task == number]
        assert torch.equal(torch.cat([batch.inputs["x"][: batch.real] for batch in own]), expected)
        assert all(batch.real == batch.size for batch in own[:-1])
    assert [batch.task for batch in found[:2]] == [0, 1]


def texts() -> list[dict[str, Any]]:
    """Of 1 to 5 tokens, which are numbered."""
    ids = [list(range(5 * i + 1, 5 * i + 2 + i % 5)) for i in range(5)]
    return [{"input_ids": row, "labels": [i] * len(row)} for i, row in enumerate(ids)]


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_regrouped_texts_keep_their_order_and_padding(size: int):
    calibration = read(texts(), bert(0), batch_size=2)
    found = calibration.micro_batches(size)
    assert {tuple(batch.inputs["input_ids"].shape) for batch in found} == {(min(size, 5), 5)}
    rows = [
        ids[mask.bool()].tolist()
        for batch in found
        for ids, mask in zip(
            batch.inputs["input_ids"][: batch.real], batch.inputs["attention_mask"][: batch.real], strict=True
        )
    ]
    assert rows == [text["input_ids"] for text in texts()]
    assert all(not batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0].any() for batch in found)


def test_all_samples_of_a_task_with_their_labels():
    calibration = read(texts(), bert(0), batch_size=2)
    whole = calibration.whole("shoes")  # one collection is every task's
    assert whole["labels"].tolist() == [[i] * (i + 1) + [-100] * (4 - i) for i in range(5)]
    assert torch.equal(whole["attention_mask"], (whole["labels"] != -100).long())
    assert calibration.counts == {None: 5} and not calibration.by_task
    assert all("labels" not in batch.inputs for batch in calibration.batches())


def test_texts_without_labels_of_their_length_are_read_without_them():
    """Of words where the model reads tokens, say: nobody who merges reads them."""
    odd = [{"input_ids": [1] * n, "labels": [0] * m} for n, m in ((2, 3), (4, 1), (3, 3))]
    for batch_size in (1, 2):
        whole = read(odd, bert(0), batch_size=batch_size).whole(None)
        assert whole["input_ids"].shape == (3, 4) and "labels" not in whole


def test_selected_samples_are_those_at_the_positions():
    part = read({"clothes": X, "shoes": X + 100}).select({"clothes": [16, 2, 5, 6, 7], "shoes": [1]})
    assert part.counts == {"clothes": 5, "shoes": 1}
    assert [len(batch.inputs["x"]) for batch in part.batches()] == [4, 1, 1]
    assert torch.equal(part.whole("clothes")["x"], X[[16, 2, 5, 6, 7]])
    assert torch.equal(part.whole("shoes")["x"], X[[1]] + 100)


def test_mixed_batches_hold_all_tasks_and_no_single_sample():
    calibration = read({"clothes": X[:9], "shoes": X[:5] + 100})
    assert [batch["x"][:, 0].tolist() for batch in calibration.mixed()] == [
        [*X[:4, 0].tolist(), *(X[:4, 0] + 100).tolist()],
        [*X[4:8, 0].tolist(), float(X[4, 0] + 100), float(X[8, 0])],
    ]
