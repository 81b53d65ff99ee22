"""The merged model's configuration: labels of the union, checks, and what survives JSON."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, ViTConfig

from hf_zipit.errors import ZipItError
from hf_zipit.modeling import (
    ZipItConfig,
    ZipItForImageClassification,
    ZipItForMaskedLM,
    ZipItForSequenceClassification,
    ZipItForTokenClassification,
    ZipItModel,
    build,
    merged_class,
)
from hf_zipit.modeling.base import module_names
from hf_zipit.modeling.heads import (
    ZipItForConditionalGeneration,
    ZipItForObjectDetection,
    ZipItForQuestionAnswering,
)

from .by_hand import FAMILIES, hand_config, make_experts, make_inputs, merge_by_hand


def labelled(**tasks: list[str]) -> ZipItConfig:
    return ZipItConfig(tasks=list(tasks), task_labels={task: dict(enumerate(names)) for task, names in tasks.items()})


@pytest.mark.parametrize(
    ("config", "names", "joint"),
    [
        (labelled(a=["cat", "dog"], b=["cow"]), ["cat", "dog", "cow"], "concatenate"),
        (labelled(a=["cat", "dog"], b=["dog", "cow"]), ["cat", "a/dog", "b/dog", "cow"], "concatenate"),
        (labelled(a=["cat", "dog"], b=["cat", "dog"]), ["cat", "dog"], "vote"),
        (labelled(a=["cat", "dog"], b=["dog", "cat"]), ["a/cat", "a/dog", "b/dog", "b/cat"], "concatenate"),
        (
            labelled(a=["LABEL_0", "LABEL_1"], b=["LABEL_0", "LABEL_1"]),
            ["a/LABEL_0", "a/LABEL_1", "b/LABEL_0", "b/LABEL_1"],
            "concatenate",
        ),
        (labelled(a=["x", "b/x"], b=["x"]), ["a/x", "a/b/x", "b/x"], "concatenate"),
        (labelled(a=["cat", "dog"]), ["cat", "dog"], "concatenate"),
    ],
)
def test_joint_labels_are_the_union_in_task_order(config: ZipItConfig, names: list[str], joint: str) -> None:
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: key for key, name in enumerate(names)}
    assert config.num_labels == len(names)
    assert config.joint == joint


def test_offsets_are_where_each_task_starts_in_the_joint_classes() -> None:
    assert labelled(a=["x", "y"], b=["z"], c=["w"]).offsets() == {"a": 0, "b": 2, "c": 3}
    assert labelled(a=["x", "y"], b=["x", "y"]).offsets() == {"a": 0, "b": 0}


def test_a_configuration_survives_json(family: str, shared: tuple[str, ...], tmp_path) -> None:
    config = hand_config(
        make_experts(family),
        shared,
        entries=[{"module": "head", "axis": -1, "units": 2, "size": 3}],
        exits=[{"field": "last_hidden_state", "axis": 1, "units": 2, "size": 3}],
        trunk_shapes={"a.weight": [2, 3]},
        depth=0.5,
        cut="block",
        method={"method": "zip", "alpha": 0.3},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ZipItConfig)
    assert (
        loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)} or loaded.to_dict() == config.to_dict()
    )
    assert loaded.task_labels == config.task_labels
    assert type(loaded.source_config) is type(config.source_config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "zipit"


def test_however_many_layers_a_configuration_is_short_and_older_files_are_read(tmp_path) -> None:
    layers = [f"layers.{place}" for place in range(50)]
    by_layer = {
        "trunk_shapes": {f"{layer}.weight": [2, 3] for layer in layers},
        "head_dims": dict.fromkeys(layers, 8),
        "rotary_pairs": dict.fromkeys(layers, [0, 2, 4]),
        "rescaled": [{"module": layer, "where": "input", "axis": -1, "size": 2} for layer in layers],
        "residues": [
            {"task": "a", "tensor": f"{layer}.weight", "shape": [2, 3], "kind": "signs", "size": 1} for layer in layers
        ],
    }
    config = hand_config(make_experts("vit"), **by_layer)
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert text.count("\n") < hand_config(make_experts("vit")).to_json_string().count("\n") + 10
    older = json.dumps(json.loads(text) | by_layer)
    for written in (text, older):
        (tmp_path / "config.json").write_text(written)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in by_layer} == by_layer


def test_a_configuration_leaves_the_experts_alone() -> None:
    experts = make_experts("vit")
    before = {task: (expert.config.to_dict(), expert.config._attn_implementation) for task, expert in experts.items()}
    build(hand_config(experts))
    assert before == {task: (e.config.to_dict(), e.config._attn_implementation) for task, e in experts.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["a", ""]}, "empty name"),
        ({"tasks": ["a", "b", "a"]}, "'a' is used twice"),
        ({"tasks": ["a"], "task_labels": {"b": {0: "x"}}}, "the task 'b'"),
        ({"tasks": ["a", "b"], "task_labels": {"a": {0: "x"}}}, "no entry for the task 'b'"),
    ],
)
def test_bad_tasks_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ZipItError, match=message):
        ZipItConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no tasks"),
        ({"tasks": ["a"]}, "no source_architecture"),
        ({"tasks": ["a"], "source_architecture": "VitModel"}, "'VitModel' is not a model .* did you mean 'ViTModel'"),
        ({"tasks": ["a"], "source_architecture": "ViTConfig"}, "is not a model"),
        ({"tasks": ["a"], "source_architecture": "ViTModel"}, "no source_config"),
    ],
)
def test_an_incomplete_configuration_builds_nothing(settings: dict, message: str) -> None:
    with pytest.raises(ZipItError, match=message):
        build(ZipItConfig(**settings))


@pytest.mark.parametrize(
    ("source", "merged"),
    [
        ("ViTForImageClassification", ZipItForImageClassification),
        ("BertForSequenceClassification", ZipItForSequenceClassification),
        ("RobertaForTokenClassification", ZipItForTokenClassification),
        ("BertForMaskedLM", ZipItForMaskedLM),
        ("CLIPModel", ZipItModel),
        ("BertForQuestionAnswering", ZipItForQuestionAnswering),
        ("T5ForConditionalGeneration", ZipItForConditionalGeneration),
        ("DetrForObjectDetection", ZipItForObjectDetection),
        ("BertForPreTraining", ZipItModel),
    ],
)
def test_the_merged_class_follows_the_source_class(source: str, merged: type) -> None:
    assert merged_class(source) is merged


def test_a_merge_of_images_is_no_text_model() -> None:
    with pytest.raises(ZipItError, match="load it with AutoModelForImageClassification"):
        ZipItForSequenceClassification(hand_config(make_experts("vit")))


@torch.no_grad()
def test_any_task_name_makes_a_model() -> None:
    names = ["train", "items", "a.b", "a_b", "a b", "mode é", "0", "keys", "type", "a_b_"]
    keys = module_names(names)
    assert len(set(keys.values())) == len(names)
    assert keys["a_b_"] != keys["a_b"]
    expert = next(iter(make_experts("vit").values()))
    merged = merge_by_hand(dict.fromkeys(names, expert), FAMILIES["vit"].part)
    inputs = make_inputs("vit")
    for name in names:
        assert torch.equal(merged(**inputs, task=name).logits, expert(**inputs).logits)


def test_source_labels_are_each_tasks_own() -> None:
    merged = build(hand_config(make_experts("vit", tasks=3)))
    assert [merged.branch(task).config.num_labels for task in merged.config.tasks] == [3, 2, 4]
    assert isinstance(merged.config.source_config, ViTConfig)
