"""Models where they are to run, what a device knows, and sums over the processes that run them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@contextmanager
def modes_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    """On leaving, every module is in training or eval mode as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def placed(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Models in eval mode and on the device, unless a `device_map` has placed them; as they were on leaving."""
    models = {id(model): model for model in models}.values()
    homes: dict[nn.Module, torch.device] = {}
    with modes_kept(models):
        try:
            for model in models:
                model.eval()
                home = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), device)
                if not getattr(model, "hf_device_map", None) and home != device:
                    homes[model] = home
                    model.to(device)
            yield
        finally:
            for model, home in homes.items():
                model.to(home)


@contextmanager
def running(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Models in eval mode on a device, without gradients; as they were on leaving."""
    with placed(models, device), torch.no_grad():
        yield


WITHOUT_FLOAT64 = ("mps",)
"""Devices that know no float64."""


def solving_device(device: torch.device) -> torch.device:
    """Where float64 sums are kept and solved: the device, or the CPU where it knows no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; zero where it cannot be asked."""
    try:
        return float(torch.get_device_module(device).mem_get_info(device)[0])
    except (AttributeError, AssertionError, RuntimeError, NotImplementedError):
        return 0.0


def all_reduce_sum(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum of a tensor over all processes, where the tensor is."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)
