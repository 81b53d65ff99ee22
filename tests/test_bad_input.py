"""Bad input is told in one sentence, as an error of hf_zipit, and before any data is touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_zipit import MergeConfig, RefitConfig, merge, observe, plan
from hf_zipit.errors import DataError, ExpertError, OutputError, RecipeError, SpecError, ZipItError

from . import tiny

Arguments = dict[str, Any]


class Untouchable:
    """Calibration data that nobody may look at yet."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the calibration data was read")


def vit(seed: int = 0, **settings: Any) -> PreTrainedModel:
    return tiny.build("vit", seed, **settings)


def two(**more: Any) -> Arguments:
    return {"experts": {"clothes": vit(0), "shoes": vit(1)}, **more}


def against(other: PreTrainedModel, first: PreTrainedModel | None = None) -> Arguments:
    return {"experts": {"clothes": first or vit(), "shoes": other}}


def broken(value: float) -> Arguments:
    model = vit(1)
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[3, 4] = value
    return against(model)


def resized() -> Arguments:
    model = vit(1)
    model.vit.layers[0].mlp.fc1 = torch.nn.Linear(32, 48)
    return against(model)


def bert(seed: int = 0, **settings: Any) -> PreTrainedModel:
    return tiny.build("bert-sequence", seed, **settings)


WRONG_EXPERTS: dict[str, tuple[Callable[[], Arguments], str]] = {
    "none": (lambda: {"experts": {}}, "at least two experts.*none"),
    "only one": (lambda: {"experts": {"clothes": vit()}}, "at least two experts.*'clothes'"),
    "a task twice": (
        lambda: {"experts": [("clothes", vit(0)), ("clothes", vit(1))]},
        "'clothes' is given to 2 experts",
    ),
    "an empty task": (lambda: {"experts": {"clothes": vit(0), " ": vit(1)}}, "the task name ' ' is empty"),
    "a task that is no text": (lambda: {"experts": {"clothes": vit(0), 3: vit(1)}}, "the task name 3"),
    "other architectures": (
        lambda: against(bert()),
        "'shoes' is a BertForSequenceClassification.*'clothes' is a ViTFor",
    ),
    "other heads": (lambda: against(tiny.build("vit-features")), "'shoes' is a ViTModel"),
    "other sizes": (
        lambda: against(vit(intermediate_size=48)),
        "field intermediate_size: 64 for 'clothes', 48 for 'shoes'",
    ),
    "other depths": (lambda: against(vit(num_hidden_layers=3)), "field num_hidden_layers"),
    "other heads of attention": (lambda: against(vit(num_attention_heads=2)), "field num_attention_heads"),
    "other nested sizes": (
        lambda: against(
            tiny.build("clip-image", 1, text_config={**tiny.TEXT, "eos_token_id": 3}), tiny.build("clip-image")
        ),
        r"field text_config\.eos_token_id",
    ),
    "position tables of words": (
        lambda: against(bert(1, max_position_embeddings=30), bert()),
        "max_position_embeddings: 20.*30.*position tables have different lengths",
    ),
    "position tables of images": (lambda: against(vit(image_size=24)), "field image_size: 16.*24"),
    "a layer replaced by hand": (resized, r"tensor vit\.layers\.0\.mlp\.fc1\.weight has shape \(64, 32\).*\(48, 32\)"),
    "NaN in weights": (lambda: broken(float("nan")), r"tensor vit\.layers\.1\.mlp\.fc1\.weight of the expert 'shoes'"),
    "infinite weights": (
        lambda: broken(float("inf")),
        r"tensor vit\.layers\.1\.mlp\.fc1\.weight of the expert 'shoes'",
    ),
    "a missing folder": (lambda: {"experts": {"clothes": vit(), "shoes": Path("no/such")}}, "'shoes'.*folder no/such"),
    "a missing path": (lambda: {"experts": {"clothes": vit(), "shoes": "./no/such"}}, r"'shoes'.*folder \./no/such"),
}

WRONG_SETTINGS: dict[str, tuple[Arguments, str]] = {
    "unknown method": ({"method": "zipp"}, "no method named 'zipp'; did you mean 'zip'"),
    "unknown option": ({"method": "zip", "options": {"alhpa": 0.1}}, "no option 'alhpa'; did you mean 'alpha'"),
    "option of another method": (
        {"method": "identity", "options": {"alpha": 0.1}},
        "'identity' has no option 'alpha'",
    ),
    "option out of range": ({"method": "zip", "options": {"alpha": 3.0}}, "alpha is 3.0; it must be between 0 and 1"),
    "unknown combiner": ({"combine": "averag"}, "no rule named 'averag'; did you mean 'average'"),
    "unknown residual": ({"residual": "rotate"}, "residual is 'rotate'"),
    "override of nothing": ({"overrides": {"*.nothing": "permute"}}, r"'\*\.nothing' matches no movable space"),
    "override out of range": ({"overrides": {"*.fc1": {"method": "zip", "beta": -1}}}, "beta is -1"),
    "depth above 1": ({"depth": 1.5}, "depth is 1.5; it must be a share from 0 to 1"),
    "depth below 0": ({"depth": -0.1}, "depth is -0.1; it must be a share from 0 to 1"),
    "depth that is no number": ({"depth": True}, "depth is True; it must be a share from 0 to 1"),
    "depth at no block": ({"depth": "vit.layer.1"}, "'vit.layer.1' is no block of ViT.*did you mean 'vit.layers.1'"),
    "a fraction of no rows": ({"row_fraction": 0.0}, "row_fraction is 0.0; it must be 'auto' or a number above 0"),
    "unknown setting": ({"sead": 1}, "no setting 'sead' of a merge; did you mean 'seed'"),
    "options of no method": ({"options": {"alpha": 0.1}}, "name the method that they are for"),
}


def assert_one_sentence(error: BaseException) -> None:
    assert str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize("case", WRONG_EXPERTS)
def test_wrong_experts(case: str):
    arguments, message = WRONG_EXPERTS[case]
    with pytest.raises(ExpertError, match=message) as raised:
        merge(calibration=Untouchable(), **arguments())
    assert_one_sentence(raised.value)


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings(case: str):
    arguments, message = WRONG_SETTINGS[case]
    with pytest.raises(RecipeError, match=message) as raised:
        merge(calibration=Untouchable(), **two(**arguments))
    assert_one_sentence(raised.value)


@pytest.mark.parametrize("case", ["unknown method", "unknown option", "option out of range", "depth at no block"])
def test_a_plan_tells_the_same(case: str):
    arguments, message = WRONG_SETTINGS[case]
    with pytest.raises(RecipeError, match=message):
        plan(**two(**arguments))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "calibration="),
        (torch.zeros(0, 3, 16, 16), "no calibration data"),
        ([], "no calibration data"),
        ({"clothes": torch.zeros(2, 3, 16, 16), "shoes": torch.zeros(0, 3, 16, 16)}, "no calibration data.*'shoes'"),
        ({"clothes": torch.zeros(2, 3, 16, 16)}, r"no calibration data for the tasks \['shoes'\]"),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.long)}, "pixel_values"),
        (torch.zeros(2, 3, 20, 20), "cannot run on calibration inputs"),
    ],
)
def test_wrong_data(calibration: Any, message: str):
    with pytest.raises(DataError, match=message) as raised:
        merge(calibration=calibration, method="zip", **two())
    assert_one_sentence(raised.value)


def test_nan_in_activations_names_the_module():
    model = vit(1)
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight.mul_(1e30)
        model.vit.layers[0].mlp.fc1.bias.fill_(3e38)
    with pytest.raises(ExpertError, match=r"'shoes' computes NaN or infinite values.*vit\.layers\.0\.mlp") as raised:
        merge(calibration=torch.ones(4, 3, 16, 16) * 1e10, **against(model))
    assert_one_sentence(raised.value)


def test_unwritable_moments(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as raised:
        observe(plan(method="zip", **two()), torch.ones(4, 3, 16, 16)).save(tmp_path / "file" / "moments.safetensors")
    assert_one_sentence(raised.value)


def test_missing_moments(tmp_path: Path):
    with pytest.raises(DataError, match="no moments file"):
        merge(moments=tmp_path / "none.safetensors", method="zip", **two())


def test_model_that_cannot_be_traced():
    class Asking(type(vit())):  # type: ignore[misc]
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            hidden = self.vit.embeddings(pixel_values)
            return hidden if hidden.sum() > 0 else -hidden

    models = {name: Asking(vit().config) for name in ("clothes", "shoes")}
    with pytest.raises(SpecError, match=r"could not be traced with inputs \['pixel_values'\]") as raised:
        merge(models, Untouchable())
    assert "\n" not in str(raised.value)


def test_all_errors_have_one_base():
    assert all(
        issubclass(error, ZipItError) for error in (DataError, ExpertError, OutputError, RecipeError, SpecError)
    )
    assert re.match("hf_zipit", ZipItError.__module__)


def of_one_number(value: float) -> dict[str, PreTrainedModel]:
    models = {"clothes": vit(0), "shoes": vit(1)}
    with torch.no_grad():
        for parameter in (p for model in models.values() for p in model.parameters()):
            parameter.fill_(value)
    return models


@pytest.mark.parametrize("settings", [{"method": "zip", "refit": True}, {}])
def test_weights_that_are_all_equal_are_merged(settings: Arguments):
    torch.manual_seed(14)  # one of eight where what was no more than rounding was regressed
    merged = merge(of_one_number(0.01), torch.randn(8, 3, 16, 16), **settings)
    assert merged(torch.randn(2, 3, 16, 16)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "identity", "refit": True}, r"'clothes' computes NaN .*vit\.layers\.0"),
        ({"method": "weights"}, "weights are too large to be compared"),
    ],
)
def test_weights_that_overflow_are_told(settings: Arguments, message: str):
    with pytest.raises(ExpertError, match=message) as raised:
        merge(of_one_number(1e20), torch.randn(8, 3, 16, 16), **settings)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize("data", [torch.zeros(4, 3, 16, 16, device="meta"), torch.ones(4, 3, 16, 16) * 1j])
def test_data_without_real_values(data: torch.Tensor):
    with pytest.raises(DataError, match="give real numbers") as raised:
        merge(calibration=data, method="zip", **two())
    assert_one_sentence(raised.value)


def test_a_setting_is_checked_where_it_is_made():
    for wrong, message in {"sead": "did you mean 'seed'", "metod": "did you mean 'method'"}.items():
        with pytest.raises(RecipeError, match=message):
            MergeConfig(**{wrong: 1})
    with pytest.raises(RecipeError, match="given by name, as method='zip'"):
        MergeConfig("zip")
    with pytest.raises(RecipeError, match="did you mean 'ridge'"):
        RefitConfig(rige=1)
    with pytest.raises(RecipeError, match="refit's ridge should be a number, but is 'x'"):
        RefitConfig(ridge="x")
