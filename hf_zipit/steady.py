"""What surrounds a merge must not reach into it: torch's ambient settings, other threads, the global random state.

Under `torch.autocast`, another default dtype or device, or `inference_mode`, the same code computes something else;
`torch.export`, the initialisation of empty models and the number of threads belong to the process, so that two merges
at once would disturb each other. Everything public that computes runs inside `steady`, which one thread holds at a
time. Memory that runs out there is told in one sentence.

Invariants: the result does not depend on the ambient settings, and the global random states of torch, numpy and Python
are afterwards what they were.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from hf_zipit.errors import TOO_LARGE, OutOfMemoryError, is_out_of_memory

Function = TypeVar("Function", bound=Callable[..., Any])

LOCK = threading.RLock()
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def accelerator() -> str:
    """The kind of accelerator that this machine has; `cuda` where it has none."""
    found = torch.accelerator.current_accelerator()
    return "cuda" if found is None else found.type


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 is multiplied as float32, not as TF32 or bfloat16: convolutions on CUDA do so unless they are told."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def steady_state() -> Iterator[None]:
    """float32 by default, exactly multiplied, on the CPU by default, no autocast, no inference mode; one thread."""
    with LOCK, ExitStack() as stack:
        dtype, python, numpy = torch.get_default_dtype(), random.getstate(), np.random.get_state()
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numpy)
        stack.enter_context(torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=accelerator()))
        stack.enter_context(exact_products())
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":  # the context costs a little in every call of torch
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(f"The work was stopped: {TOO_LARGE}.") from error


@contextmanager
def same_draws() -> Iterator[None]:
    """What a forward pass draws at random (ViT-MAE's mask) is the same in here every time, of all models.

    Elsewhere than on the CPU the random state is not put back; `steady` does that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def forget(model: nn.Module) -> None:
    """Have a model let go of what it keeps of a forward pass for the next one, because its weights are others now.

    Modules that keep something which follows from their weights (LeViT its biases by place) let go of it where they
    are put into training mode; every module is in the mode it was in afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def steady(function: Function) -> Function:
    """Decorator: the function runs in a steady state."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with steady_state():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
