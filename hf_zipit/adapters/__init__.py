"""One file per model family: how to feed it, where its blocks and its task head are.

A file that decorates a subclass of `Adapter` with `@register` is found automatically.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from hf_zipit.adapters.auto import Adapter, register
from hf_zipit.errors import DataError
from hf_zipit.registry import ADAPTERS

__all__ = ["Adapter", "adapter_for", "example_inputs", "given_inputs", "inputs_are_given", "register"]

_given: ContextVar[Mapping[str, Tensor] | None] = ContextVar("hf_zipit_example_inputs", default=None)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family; the defaults (`auto`) where none is registered."""
    return ADAPTERS.find(getattr(getattr(model, "config", None), "model_type", "")) or Adapter()


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """The inputs that a user gave (`given_inputs`), else those that the model's adapter makes."""
    given = _given.get()
    return adapter_for(model).inputs(model) if given is None else dict(given)


def inputs_are_given() -> bool:
    """Whether a user gave the example inputs of what is running."""
    return _given.get() is not None


@contextmanager
def given_inputs(inputs: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside, these are the example inputs of every model; None changes nothing.

    Raises:
        DataError: they are no mapping with a tensor.
    """
    if inputs is None:
        yield
        return
    if not isinstance(inputs, Mapping) or not any(isinstance(x, Tensor) for x in inputs.values()):
        raise DataError(
            f"example_inputs is a {type(inputs).__name__}; give the keyword arguments of a forward pass as a mapping, "
            "tensors with two samples or more"
        )
    token = _given.set(inputs)
    try:
        yield
    finally:
        _given.reset(token)
