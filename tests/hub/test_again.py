"""Merged models can be merged again: a task of one is a plain model, and a merged model stands for its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

import hf_zipit
from hf_zipit.errors import ExpertError
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.running.run import run_recipe
from tests import tiny
from tests.test_device import FEW

FAMILIES = ("vit", "bert-sequence", "bert-masked", "roberta-sequence", "distilbert-masked", "resnet-basic", "clip")


def calibration(name: str) -> dict[str, torch.Tensor]:
    from hf_zipit.adapters import adapter_for

    model = tiny.build(name)
    inputs = adapter_for(model).inputs(model)
    torch.manual_seed(5)
    size = 16

    def more(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return torch.randn(size, *x.shape[1:])
        return torch.randint(3, 50, (size, *x.shape[1:])) if x.max() > 1 else x[:1].expand(size, *x.shape[1:]).clone()

    return {key: more(x) for key, x in inputs.items()}


def merge(experts: dict[str, Any], data: Any = None, **settings: Any) -> PreTrainedModel:
    return hf_zipit.merge(experts, data, **settings)


@torch.no_grad()
def assert_same(model: PreTrainedModel, merged: PreTrainedModel, task: str, data: dict[str, torch.Tensor]) -> None:
    expected, found = merged(**data, task=task), model(**data)
    compared = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    assert compared
    for key in compared:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [*tiny.mostly_seldom(((name, "zip+refit") for name in FAMILIES), 2), ("vit", "zip"), ("resnet-basic", "permute")],
)
def test_a_task_of_a_merged_model_is_a_plain_model(name: str, method: str, tmp_path: Path):
    data = calibration(name)
    first, second = tiny.pair(name)
    kind, _, refit = method.partition("+")
    merged = merge({"a": first, "b": second}, data, method=kind, refit=FEW if refit else False)
    for task, source in (("a", first), ("b", second)):
        model = merged.expert(task)
        assert type(model) is type(source)
        assert_same(model, merged, task, data)
        model.save_pretrained(tmp_path / task)
        assert_same(type(model).from_pretrained(tmp_path / task), merged, task, data)


def test_a_decoder_is_a_plain_model_again():
    """Its example inputs hold a switch beside the tensors."""
    first, second = tiny.pair("gpt2")
    merged = merge({"a": first, "b": second}, calibration("bert-masked"), method="permute")
    ids = {"input_ids": calibration("bert-masked")["input_ids"]}
    assert_same(merged.expert("a"), merged, "a", ids)


def test_more_heads_than_another_expert_has():
    data = calibration("vit")
    first, second = tiny.pair("vit")
    split = merge({"a": first, "b": second}, data, method="identity", refit=True)
    assert split.config.head_dims
    with pytest.raises(ExpertError, match=r"num_attention_heads: 8 for 'x/a', 4 for 'z'; .* split_heads off"):
        merge({"x": split, "z": first}, data, method="identity")
    again = merge({"x": split, "y": split}, data, method="permute")
    for task in ("a", "b"):
        assert_same(again.expert(f"x/{task}"), again, f"x/{task}", data)


def test_below_full_depth_a_task_is_a_plain_model_where_units_are_only_ordered():
    data = calibration("vit")
    first, second = tiny.pair("vit")
    merged = merge({"a": first, "b": second}, data, method="permute", depth=0.5)
    index = merged.entries["b"][0].index
    assert not torch.equal(index, torch.arange(len(index)))  # there was something to undo
    for task in ("a", "b"):
        assert_same(merged.expert(task), merged, task, data)
    zipped = merge({"a": first, "b": second}, data, method="zip", depth=0.5)
    with pytest.raises(ExpertError, match="the task 'a' .*cannot be a plain ViTForImageCl.*depth 1"):
        zipped.expert("a")


def test_an_expert_shares_no_memory_with_the_merged_model():
    data = calibration("vit")
    first, second = tiny.pair("vit")
    merged = merge({"a": first, "b": second}, data, method="permute")
    before = merged(**data).logits.clone()
    with torch.no_grad():
        for parameter in merged.expert("a").parameters():
            parameter.zero_()
    assert torch.equal(merged(**data).logits, before)


def test_a_merged_model_stands_for_its_tasks():
    data = calibration("vit")
    first, second = tiny.pair("vit")
    third = tiny.build("vit", 2, num_labels=2)
    both = merge({"a": first, "b": second}, data, method="zip")
    again = merge({"x": both, "z": third}, {"x": data["pixel_values"], "z": data["pixel_values"]}, method="zip")
    assert again.config.tasks == ["x/a", "x/b", "z"]
    parts = {"x/a": both.expert("a"), "x/b": both.expert("b"), "z": third}
    by_hand = merge(parts, dict.fromkeys(parts, data["pixel_values"]), method="zip")
    assert torch.equal(again(**data).logits, by_hand(**data).logits)
    with pytest.raises(ExpertError, match="'x/a' is given to 2 experts"):
        merge({"x": both, "x/a": third}, data)


def test_merging_a_merged_model_with_itself_changes_nothing():
    data = calibration("vit")
    first, second = tiny.pair("vit")
    both = merge({"a": first, "b": second}, data, method="zip")
    again = merge({"x": both, "y": both}, data, method="zip")
    for task in ("a", "b"):
        for name in ("x", "y"):
            torch.testing.assert_close(
                again(**data, task=f"{name}/{task}").logits, both(**data, task=task).logits, rtol=1e-4, atol=1e-4
            )


def test_a_merged_model_of_which_no_plain_models_can_be_made_is_told_by_name():
    data = calibration("vit")
    first, second = tiny.pair("vit")
    half = merge({"a": first, "b": second}, data, method="zip", depth=0.5)
    with pytest.raises(ExpertError, match="the expert 'x' is a merged model that cannot be merged again: ") as raised:
        merge({"x": half, "z": tiny.build("vit", 3)}, data)
    assert "\n" not in str(raised.value)


def test_the_recipe_of_a_second_merge_runs(tmp_path: Path):
    data = calibration("vit")
    first, second = tiny.pair("vit")
    for name, model in {"a": first, "b": second, "z": tiny.build("vit", 2, num_labels=2)}.items():
        model.save_pretrained(tmp_path / name)
    merge({"a": tmp_path / "a", "b": tmp_path / "b"}, data, method="identity").save_pretrained(tmp_path / "both")
    again = merge({"x": tmp_path / "both", "z": tmp_path / "z"}, method="identity")
    again.save_pretrained(tmp_path / "again")
    written = yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())
    assert [entry.get("task") for entry in written["experts"].values()] == ["a", "b", None]
    written["output"] = str(tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    result = run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    mine, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", result.model))
    assert mine == theirs
    written["experts"]["z"]["sha256"] = "0" * 64
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    with pytest.raises(ExpertError, match="the expert 'z' have the sha256 .* but the recipe asks for 000000000000"):
        run_recipe(load_recipe(tmp_path / "recipe.yaml"))
