"""A merge on another device than the CPU: no op meets tensors of two devices, and the result is the CPU's.

The device is played by the CPU; see `second_device.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_zipit import merge
from hf_zipit.registry import CORRECTIONS

from . import tiny
from .second_device import accelerator_on_second, second_device
from .test_invariants import calibration

SAMPLES = 12


def merged(name: str, on_second: bool, **settings: Any) -> dict[str, Tensor]:
    models = dict(zip("ab", tiny.pair(name), strict=True))
    data = {task: {n: x[:SAMPLES] for n, x in calibration(model).items()} for task, model in models.items()}
    if not on_second:
        return merge(models, data, **settings).state_dict()
    with second_device():
        return merge(models, data, accelerator=accelerator_on_second(), **settings).state_dict()


COMPARED = ("vit", "bert-masked", "resnet-bottleneck", "llama")

CHOOSES_BY_DEVICE = ("mixtral",)
"""Classes whose own code runs other ops where it is told that it is on CUDA, which the CPU does not have."""

ONE_OF_EACH = (
    "vit", "bert-masked", "resnet-bottleneck", "convnext", "llama", "qwen3", "wav2vec2", "bart",
)  # fmt: skip
"""Nearly every kind of layer and of head; the others run where there is time."""

NAMES = tiny.mostly_seldom(
    (name for name in (*tiny.REQUIRED, *tiny.EXTRA) if name not in CHOOSES_BY_DEVICE), every=0, always=ONE_OF_EACH
)

FEW = {"attention_steps": 2, "unit_steps": 2, "answer_steps": 2, "written_samples": 2 * SAMPLES}
"""Every step of the refit and every kind of sample, but only a few: which device they are on is the same for all."""


@pytest.mark.parametrize("name", NAMES)
def test_no_op_meets_tensors_of_two_devices(name: str):
    there = merged(name, on_second=True, refit=FEW)
    if name in COMPARED:
        here = merged(name, on_second=False, refit=FEW)
        assert [key for key, tensor in here.items() if not torch.equal(tensor, there[key])] == []


@pytest.mark.parametrize("name", CORRECTIONS.names())
def test_corrections_run_there(name: str):
    model = "resnet-bottleneck" if name == "batchnorm-reset" else "vit"
    merged(model, on_second=True, method="permute", corrections=name)


@pytest.mark.parametrize("name", ("zip", "cca", "partial", "dual"))
def test_other_methods_run_there(name: str):
    merged("vit", on_second=True, method=name, refit=None)


def test_joint_heads_run_there():
    merged("vit", on_second=True, method="permute", refit={**FEW, "joint_heads": True})


def test_the_second_device_is_told_from_the_first():
    with second_device() as device, pytest.raises(AssertionError, match="two devices"):
        torch.ones(3, device=device) + torch.ones(3)
