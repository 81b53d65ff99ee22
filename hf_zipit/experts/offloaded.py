"""Experts that accelerate has placed: layers on several devices, or weights in memory or files until a layer runs.

Such a model has hooks in place of its forward passes and, where weights are offloaded, tensors without values. What is
merged is the plain model: the same modules, with the tensors that the hooks would bring.

Invariants: the placed model stays as it is; weights that are offloaded to safetensors files are read from there when
they are used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

HUNG = ("_hf_hook", "forward", "_old_forward")
"""What accelerate hangs onto a module that it places."""


def is_placed(model: nn.Module) -> bool:
    """Whether some module has a hook that brings or moves tensors."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def plain_copy(model: Model) -> Model:
    """The model without hooks, on the CPU. It shares all tensors that are there; what nobody keeps stays empty."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        values = offloaded(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _on_cpu(values.get(name, tensor) if tensor.is_meta else tensor, tensor)
        memo |= {id(vars(module)[name]): None for name in HUNG if name in vars(module)}
    plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        for name in HUNG:
            vars(module).pop(name, None)
    vars(plain).pop("hf_device_map", None)
    return plain


def offloaded(module: nn.Module) -> Mapping[str, Tensor]:
    """What a module's hook keeps for it, by the tensors' own names."""
    hook = getattr(module, "_hf_hook", None)
    kept = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,)))
    return next((values for values in kept if values is not None), {})


def _on_cpu(value: Tensor, like: Tensor) -> Tensor:
    found = value.detach() if value.is_meta else value.detach().cpu()
    return nn.Parameter(found, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else found
