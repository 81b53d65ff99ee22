"""A pair's data as folders that recipes read: every split, with the names of the classes."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.zoo.export import export
from benchmarks.zoo.pair import Metric, Pair
from hf_zipit.recipe.sources import class_names, load_source


def pair(classes: dict[str, tuple[str, ...]] | None) -> Pair:
    def rows(size: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(2 * size).view(size, 2), "labels": torch.arange(size) % 2}

    splits = {task: {"train": rows(6), "validation": rows(2), "test": rows(4)} for task in "ab"}
    return Pair("toy", {}, splits, Metric("accuracy", classes=classes))


def test_recipes_read_what_is_exported(tmp_path: Path) -> None:
    folder = export(pair({"a": ("no", "yes"), "b": ("cold", "hot")}), tmp_path)
    assert folder == tmp_path / "toy" / "data"
    for task, names in {"a": ["no", "yes"], "b": ["cold", "hot"]}.items():
        for split, size in {"train": 6, "validation": 2, "test": 4}.items():
            data = load_source(str(folder / task), split)
            assert len(data) == size
            assert class_names(data) == names
            assert list(data["input_ids"])[1] == [2, 3]


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    export(pair({"a": ("no", "yes"), "b": ("cold", "hot")}), tmp_path)
    folder = export(pair(None), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert not hasattr(load_source(str(folder / "a"), "test", labelled=False).features["labels"], "names")
