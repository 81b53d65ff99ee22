"""The settings of a merge: one object, the same from keywords, a dict, a file or the model that it made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit import MergeConfig, RefitConfig, merge, observe, plan
from hf_zipit.errors import RecipeError

from . import tiny
from .test_bad_input import assert_one_sentence

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))

PLAIN: dict[str, Any] = {"method": "zip", "options": {"alpha": 0.4}, "depth": 0.5, "residual": "identity", "seed": 7}

ORDERED: dict[str, Any] = {
    "overrides": {"*.mlp.fc1": "identity", "*.fc1": {"method": "permute"}},
    "corrections": ["repair", "batchnorm-reset"],
}
"""Settings whose order means something, and in which it is not that of the alphabet."""

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": PLAIN,
    "ordered": {"method": "weights", **ORDERED},
    "refitted": {"method": "permute", "refit": {"ridge": 1e-3, "joint_heads": True}, "row_fraction": 0.25},
    "options of corrections": {"corrections": [{"repair": {}}, "batchnorm-reset"], "refit": False},
    "a block": {"depth": "vit.layers.1", "combine": "task-arithmetic", "combine_options": {"scale": 0.5}},
}


def experts() -> dict[str, PreTrainedModel]:
    return dict(zip(("clothes", "shoes"), tiny.pair("vit"), strict=True))


def saved(model: PreTrainedModel, folder: Path) -> bytes:
    model.save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes()


def through_dict(config: MergeConfig, folder: Path) -> MergeConfig:
    return MergeConfig.from_dict(config.to_dict())


def through_sorted_json(config: MergeConfig, folder: Path) -> MergeConfig:
    """As a configuration file keeps it: the keys of mappings are sorted."""
    return MergeConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))


def through_file(config: MergeConfig, folder: Path) -> MergeConfig:
    config.save_pretrained(folder / "new")
    return MergeConfig.from_pretrained(folder / "new")


# It comes back as it was.


@pytest.mark.parametrize("way", [through_dict, through_sorted_json, through_file])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_it_comes_back_as_it_was(settings: dict[str, Any], way: Callable[..., MergeConfig], tmp_path: Path):
    config = MergeConfig(**settings)
    again = way(config, tmp_path)
    assert again == config
    assert list(again.overrides) == list(config.overrides)
    assert list(again.corrections) == list(config.corrections)


@pytest.mark.parametrize("settings", [PLAIN, {"method": "permute", "refit": {"micro_batch": 8}}, {}])
def test_keywords_and_a_config_give_the_same_bytes(settings: dict[str, Any], tmp_path: Path):
    by_keywords = merge(experts(), IMAGES, **settings)
    by_config = merge(experts(), IMAGES, MergeConfig(**settings))
    changed = merge(experts(), IMAGES, MergeConfig(**{**settings, "seed": 99}), seed=settings.get("seed", 0))
    bytes_of = [saved(model, tmp_path / str(i)) for i, model in enumerate((by_keywords, by_config, changed))]
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]
    assert by_keywords.config.to_dict() == by_config.config.to_dict() == changed.config.to_dict()


@pytest.mark.parametrize(
    "settings",
    [PLAIN, {"method": "permute", **ORDERED}, {"method": "identity", "refit": {"rows_per_input": 2}, "seed": 3}, {}],
    ids=["plain", "ordered", "refitted", "auto"],
)
def test_a_merged_model_gives_back_what_made_it(settings: dict[str, Any], tmp_path: Path):
    merged = merge(experts(), IMAGES, **settings)
    first = saved(merged, tmp_path / "model")
    made_by = plan(experts(), **settings).config
    found = [MergeConfig.from_pretrained(source) for source in (merged, tmp_path / "model", str(tmp_path / "model"))]
    for config in found:
        assert config == made_by and list(config.overrides) == list(made_by.overrides)
        assert list(config.corrections) == list(made_by.corrections)
    assert saved(merge(experts(), IMAGES, found[1]), tmp_path / "again") == first


def test_a_model_that_was_not_merged_has_none(tmp_path: Path):
    experts()["shoes"].save_pretrained(tmp_path / "shoes")
    for source in (experts()["shoes"], tmp_path / "shoes"):
        with pytest.raises(RecipeError, match="does not say how it was merged") as raised:
            MergeConfig.from_pretrained(source)
        assert_one_sentence(raised.value)


def test_the_face_has_few_parameters():
    """What decides the result is the config's; beside it there is only what a merge reads and where it runs."""
    own = [p for p in inspect.signature(merge).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert len(own) <= 9
    assert not {p.name for p in own} & {field.name for field in fields(MergeConfig)}


# What is wrong is told in one sentence.

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"sead": 1}, "no setting 'sead' of a merge; did you mean 'seed'"),
    "method": ({"method": "zipp"}, "no method named 'zipp'; did you mean 'zip'"),
    "method that is no name": ({"method": ["zip"]}, "no method named"),
    "no method": ({"method": None}, "no method named None; choose one of"),
    "combine": ({"combine": "averag"}, "no rule named 'averag'; did you mean 'average'"),
    "combine that is no name": ({"combine": {}}, "no rule named {}; choose one of"),
    "options of auto": ({"options": {"alpha": 1}}, "name the method that they are for"),
    "options": ({"method": "zip", "options": {"alhpa": 1}}, "no option 'alhpa'; did you mean 'alpha'"),
    "options of a wrong type": (
        {"method": "zip", "options": {"alpha": "much"}},
        "alpha of 'zip' is 'much'; .*a number",
    ),
    "options that are no mapping": ({"method": "zip", "options": 5}, "options is 5; it must be a mapping"),
    "options that are a list": ({"options": ["alpha"]}, r"options is \['alpha'\]; it must be a mapping"),
    "combine_options": ({"combine_options": {"x": 1}}, "'average' has no option 'x'"),
    "combine_options that are none": ({"combine_options": 3}, "combine_options is 3; it must be a mapping"),
    "depth above 1": ({"depth": 1.5}, "depth is 1.5; it must be a share from 0 to 1 or the path of a block"),
    "depth that is NaN": ({"depth": float("nan")}, "depth is nan"),
    "no depth": ({"depth": None}, "depth is None"),
    "depths": ({"depth": [1.0, 0.5]}, r"depth is \[1.0, 0.5\]"),
    "depth that is true": ({"depth": True}, "depth is True"),
    "residual": ({"residual": "rotate"}, "residual is 'rotate'; it must be 'match', 'identity' or 'orthogonal'"),
    "overrides": ({"overrides": 5}, "overrides is 5; it must be a name, a list of names or a mapping"),
    "overrides of a number": ({"overrides": {5: "permute"}}, "overrides should hold names, but holds 5"),
    "overrides twice": ({"overrides": [{"*.a": "zip"}, {"*.a": "permute"}]}, r"overrides names '\*\.a' twice"),
    "refit": ({"refit": "yes"}, "refit should be a mapping"),
    "refit's settings": ({"refit": {"rigde": 1}}, "refit.rigde is no known key; did you mean 'ridge'"),
    "refit out of range": ({"refit": {"ridge": 0}}, "ridge is 0.0; it must be above 0"),
    "corrections": ({"corrections": "repairs"}, "no correction named 'repairs'; did you mean 'repair'"),
    "corrections of a wrong type": ({"corrections": 5}, "corrections is 5; it must be a name"),
    "no corrections": ({"corrections": None}, "corrections is None; it must be a name"),
    "a correction's options": ({"corrections": {"repair": 5}}, "options of 'repair' are 5; they must be a mapping"),
    "corrections twice": ({"corrections": ["repair", "repair"]}, "corrections names 'repair' twice"),
    "row_fraction": ({"row_fraction": 0}, "row_fraction is 0; it must be 'auto' or a number above 0 and at most 1"),
    "row_fraction of words": ({"row_fraction": "half"}, "row_fraction is 'half'"),
    "seed below 0": ({"seed": -1}, "seed is -1; it must be a whole number from 0"),
    "seed that is no number": ({"seed": "1"}, "seed is '1'"),
    "seed that is no whole number": ({"seed": 1.5}, "seed is 1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_told_in_one_sentence(case: str):
    settings, message = WRONG[case]
    for make in (MergeConfig.of, lambda **given: MergeConfig.of(MergeConfig(), **given)):
        with pytest.raises(RecipeError, match=message) as raised:
            make(**settings)
        assert_one_sentence(raised.value)


@pytest.mark.parametrize("config", [5, "zip", ["zip"]])
def test_a_config_of_a_wrong_type(config: Any):
    with pytest.raises(RecipeError, match="give a MergeConfig, or its settings as keywords"):
        merge(experts(), IMAGES, config)


def test_what_one_method_was_told_is_not_asked_of_another():
    config = MergeConfig(**PLAIN)
    other = MergeConfig.of(config, method="permute")
    assert other == replace(config, method="permute", options={})
    assert MergeConfig.of(config, seed=8).options == {"alpha": 0.4}


# A seed decides what is drawn, and nothing else.


def test_another_seed_draws_other_rows_of_the_moments():
    def found(**settings: Any) -> dict[str, Tensor]:
        moments = observe(plan(experts(), method="permute", **settings), IMAGES)
        return {str(key): moments.correlation(key) for key in moments.keys()}  # noqa: SIM118

    drawn = [found(row_fraction=0.5, seed=seed) for seed in (0, 0, 1)]
    for key, tensor in drawn[0].items():
        assert torch.equal(tensor, drawn[1][key])
        assert not torch.equal(tensor, drawn[2][key])
    whole = [found(row_fraction=1.0, seed=seed) for seed in (0, 1)]
    assert all(torch.equal(tensor, whole[1][key]) for key, tensor in whole[0].items())


def test_another_seed_changes_nothing_where_nothing_is_drawn():
    settings = {"method": "zip", "row_fraction": 1.0, "refit": {"rows_per_input": 0}}
    first, second = (merge(experts(), IMAGES, seed=seed, **settings).state_dict() for seed in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("seed", [0, 1])
def test_another_seed_draws_other_rows_of_the_refit(seed: int):
    settings = {"method": "identity", "refit": RefitConfig(rows_per_input=1)}
    first, second = (merge(experts(), IMAGES, seed=s, **settings).state_dict() for s in (0, seed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()) == (seed == 0)


# Data is read once, whatever reads it.


def test_a_generator_serves_every_stage(tmp_path: Path):
    """Moments, the refit, a correction and joint heads read the same batches, which can be had only once."""

    def once(part: Tensor) -> Iterator[Tensor]:
        yield from part.split(5)

    settings = {"method": "permute", "refit": {"joint_heads": True, "micro_batch": 4}, "corrections": ["repair"]}
    whole = {task: list(part.split(5)) for task, part in zip(experts(), IMAGES.split(12), strict=True)}
    streams = {task: once(part) for task, part in zip(experts(), IMAGES.split(12), strict=True)}
    models = [merge(experts(), data, **settings) for data in (whole, streams)]
    assert saved(models[0], tmp_path / "list") == saved(models[1], tmp_path / "generator")
