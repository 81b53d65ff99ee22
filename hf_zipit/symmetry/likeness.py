"""Models that are alike have one trace: by what it is known, and the memory of those that were made.

A search or a sweep merges the same experts many times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import nn

from hf_zipit.symmetry.trace import tied_names

Made = TypeVar("Made")

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


def likeness(model: nn.Module) -> Hashable | None:
    """What two models have in common if one's trace is the other's: class, code, modules, tensors, configuration.

    None for a model whose trace cannot be known by that: it has no configuration, or something was hung onto it (a
    replaced `forward`, as by accelerate, or a hook).
    """
    config = getattr(model, "config", None)
    changed = any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if changed or not hasattr(config, "to_dict"):
        return None
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype.is_floating_point) for name, tensor in tensors)
    modules = tuple((type(module).forward, *_numbers(module)) for module in model.modules())
    ties = tuple(map(tuple, tied_names(model)))
    return type(model), repr(model), _settings(config), modules, shapes, ties


def _numbers(module: nn.Module) -> tuple[tuple[str, Hashable], ...]:
    """The plain attributes of a module, which a trace holds as they were: how wide heads are, what scales them."""
    plain = (bool, int, float, str)
    return tuple((name, x) for name, x in vars(module).items() if isinstance(x, plain) and name != "training")


def _settings(config: object) -> str:
    """A configuration in full, with what `to_dict` leaves out (how attention is computed), nested ones as well."""
    return json.dumps(vars(config), default=lambda x: vars(x) if hasattr(x, "to_dict") else str(x))
