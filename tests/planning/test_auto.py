"""`method="auto"`, the default: what is chosen depends on what a merge is given, stands in the model and is logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_zipit import MergeConfig, RefitConfig, merge, plan
from hf_zipit.errors import DataError
from tests import tiny
from tests.test_invariants import assert_bit_identical, calibration


def experts(name: str = "vit") -> dict[str, PreTrainedModel]:
    return dict(zip("ab", tiny.pair(name), strict=True))


CHOICES: dict[str, tuple[str, bool, dict[str, Any], tuple[str, RefitConfig | None, list[str]]]] = {
    "with data": ("vit", True, {}, ("permute", RefitConfig(), [])),
    "without data": ("vit", False, {}, ("circuits", None, [])),
    "settings of the refit": ("vit", True, {"refit": {"ridge": 0.1}}, ("permute", RefitConfig(ridge=0.1), [])),
    "no refit": ("vit", True, {"refit": False}, ("permute", None, [])),
    "nothing to refit": ("vit", True, {"depth": 0}, ("permute", None, [])),
    "a method of one's own": ("vit", True, {"method": "zip"}, ("zip", None, [])),
    "batch norms that a refit restores": ("resnet-basic", True, {}, ("permute", RefitConfig(), [])),
    "batch norms and no refit": ("resnet-basic", True, {"refit": False}, ("permute", None, ["batchnorm-reset"])),
    "batch norms and no data": ("resnet-basic", False, {}, ("circuits", None, [])),
    "batch norms and no corrections": (
        "resnet-basic", True, {"refit": False, "corrections": []}, ("permute", None, [])
    ),
    "corrections of one's own": ("vit", True, {"corrections": ["repair"]}, ("permute", RefitConfig(), ["repair"])),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_what_is_chosen(case: str):
    name, data, settings, (method, refit, corrections) = CHOICES[case]
    models = experts(name)
    planned = plan(models, data=data, **settings)
    assert (planned.config.method, planned.config.refit) == (method, refit)
    assert list(planned.config.corrections) == corrections and not planned.config.automatic
    merged = merge(models, calibration(models["a"]) if data else None, **settings)
    found = merged.config.method
    assert MergeConfig.from_dict(found) == planned.config
    assert (found["method"], bool(found["refit"])) == (method, refit is not None)


def test_auto_is_the_default():
    assert MergeConfig() == MergeConfig(method="auto", refit="auto", corrections="auto")
    assert MergeConfig().automatic


@pytest.mark.parametrize(
    ("name", "data", "settings", "message"),
    [
        ("vit", True, {}, "with data: permute + refit."),
        ("vit", False, {}, "without data: circuits."),
        ("resnet-basic", True, {"refit": False}, "with data: permute + batchnorm-reset."),
    ],
)
def test_the_choice_is_logged(
    name: str, data: bool, settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="hf_zipit"):
        plan(experts(name), data=data, **settings)
        plan(experts(name), data=data, method="permute")  # nothing is chosen here
    chosen = [record.getMessage() for record in caplog.records if "Chosen" in record.getMessage()]
    assert chosen == [f"Chosen for these experts {message}"]


@pytest.mark.parametrize("name", ["vit", "resnet-basic"])
@pytest.mark.parametrize("data", [True, False])
def test_it_is_the_merge_that_it_names(name: str, data: bool):
    """The same experts and settings give the same choice, and the choice, spelled out, gives the same model."""
    models = experts(name)
    inputs = calibration(models["a"]) if data else None
    once, twice = (merge(models, inputs).state_dict() for _ in range(2))
    assert_bit_identical(dict(twice), dict(once))
    spelled = {"method": "permute", "refit": True} if data else {"method": "circuits"}
    assert_bit_identical(dict(merge(models, inputs, **spelled).state_dict()), dict(once))


def test_a_convolutional_network_without_a_refit_gets_its_own_statistics():
    models = experts("resnet-basic")
    inputs = calibration(models["a"])
    chosen = merge(models, inputs, refit=False)
    spelled = merge(models, inputs, method="permute", corrections=["batchnorm-reset"])
    plain = merge(models, inputs, method="permute")
    assert_bit_identical(dict(chosen.state_dict()), dict(spelled.state_dict()))
    assert any(not torch.equal(t, plain.state_dict()[n]) for n, t in chosen.state_dict().items())


def test_what_is_wanted_and_needs_data_is_told_where_there_is_none():
    for settings in ({"refit": True}, {"corrections": ["repair"]}):
        with pytest.raises(DataError, match="pass a little unlabelled data"):
            plan(experts(), data=False, **settings)
