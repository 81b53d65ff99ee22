"""One file per model family: how to feed it, where its blocks and its task head are.

A file that decorates a subclass of `Adapter` with `@register` is found automatically.
"""

from __future__ import annotations

from torch import nn

from hf_zipit.adapters.auto import Adapter, register
from hf_zipit.registry import ADAPTERS

__all__ = ["Adapter", "adapter_for", "register"]


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family; the defaults (`auto`) where none is registered."""
    return ADAPTERS.find(getattr(getattr(model, "config", None), "model_type", "")) or Adapter()
