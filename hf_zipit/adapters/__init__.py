"""One file per model family: how to feed it, where its blocks and its task head are.

A file that defines a subclass of `Adapter` with `model_types` is found automatically.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from torch import nn

from hf_zipit.adapters.auto import Adapter

__all__ = ["Adapter", "adapter_for", "registered"]


@functools.cache
def registered() -> dict[str, Adapter]:
    """Every adapter by the `model_type` of the configurations it serves.

    Raises:
        ValueError: if two adapters claim one model type.
    """
    found: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(__path__):
        for item in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(item, type) and issubclass(item, Adapter) and item.__module__.endswith(f".{module.name}"):
                for model_type in item.model_types:
                    if model_type in found:
                        raise ValueError(f"two adapters for the model type {model_type!r}")
                    found[model_type] = item()
    return found


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family; the defaults (`auto`) where none is registered."""
    return registered().get(getattr(getattr(model, "config", None), "model_type", ""), Adapter())
