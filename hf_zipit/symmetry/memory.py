"""Models with the same key have the same trace: the key, and a memory of what was traced.

A search or a sweep merges the same experts many times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from hf_zipit.symmetry.interpreter import tied_names

Made = TypeVar("Made")

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that say nothing of a module, or what is read on its own: its parameters, buffers and modules."""

REMEMBERED = 8
"""How many results a memory keeps."""


class Memory(Generic[Made]):
    """The results that were asked for last, by what they depend on."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Made] = {}

    def get(self, key: Hashable | None, make: Callable[[], Made]) -> Made:
        """What was made for a key; made now if it is not remembered, and every time without a key."""
        if key is None:
            return make()
        found = self._made.pop(key) if key in self._made else make()
        self._made[key] = found
        while len(self._made) > REMEMBERED:
            del self._made[next(iter(self._made))]
        return found

    def clear(self) -> None:
        self._made.clear()


def trace_key(model: nn.Module, *more: Hashable) -> Hashable | None:
    """What a model's trace depends on: its configuration, its modules with their code and attributes, its tensors.

    `more` is what else it depends on.

    Not known is code that modules call by a global name; who replaces that has to clear the memories. None for a model
    that cannot be known by a key: it has no configuration, or something was hung onto it (a replaced `forward`, as by
    accelerate, or a hook).
    """
    config = getattr(model, "config", None)
    changed = any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if changed or not hasattr(config, "to_dict"):
        return None
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype.is_floating_point) for name, tensor in tensors)
    modules = tuple(
        (name, type(module), _code(type(module)), tuple(_attributes(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    )
    ties = tuple(map(tuple, tied_names(model)))
    return _settings(config), modules, shapes, ties, more


def _code(kind: type[nn.Module]) -> tuple[FunctionType, ...]:
    """The functions of a class of modules, and of those that it inherits from."""
    classes = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    return tuple(x for cls in classes for x in vars(cls).values() if isinstance(x, FunctionType))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Hashable]]:
    """What hangs on a module beside its tensors, modules and configurations: a trace may hold it as it was."""
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE and not hasattr(value, "to_dict"):
            yield name, _content(value)


def _content(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), value.device.type != "meta" and str(value.tolist())
    return value if isinstance(value, (type, FunctionType)) else repr(value)


def _settings(config: object) -> str:
    """A configuration in full, with what `to_dict` leaves out (how attention is computed), nested ones as well."""
    return json.dumps(vars(config), default=lambda x: vars(x) if hasattr(x, "to_dict") else str(x))
