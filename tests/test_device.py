"""A merge on another device than the CPU: no op meets tensors of two devices, and the result is the CPU's.

The device is played by the CPU; see `second_device.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.adapters import adapter_for

from . import tiny
from .second_device import accelerator_on_second, second_device

SAMPLES = 12


def data_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random samples of what a model takes."""
    torch.manual_seed(0)
    found = {}
    for name, x in adapter_for(model).inputs(model).items():
        if isinstance(x, Tensor):
            shape = (SAMPLES, *x.shape[1:])
            ids = torch.randint(3, 40, shape) if name == "input_ids" else x[:1].expand(shape)
            found[name] = torch.randn(shape) if x.is_floating_point() else ids
    return found


def merged(name: str, on_second: bool, **settings: Any) -> dict[str, Tensor]:
    models = dict(zip("ab", tiny.pair(name), strict=True))
    data = {task: data_for(model) for task, model in models.items()}
    if not on_second:
        return merge(models, data, **settings).state_dict()
    with second_device():
        return merge(models, data, accelerator=accelerator_on_second(), **settings).state_dict()


def check(name: str, **settings: Any) -> None:
    there, here = (merged(name, on_second, **settings) for on_second in (True, False))
    assert there.keys() == here.keys()
    for key, tensor in here.items():
        assert torch.equal(tensor, there[key]), key


@pytest.mark.parametrize("name", [*tiny.REQUIRED, *tiny.EXTRA])
def test_every_class(name: str):
    check(name)
