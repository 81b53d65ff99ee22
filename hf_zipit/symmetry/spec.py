"""`MergeSpec`: all spaces and axis labels of a model, inferred from one traced forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor, nn

from hf_zipit.adapters import Adapter, adapter_for, example_inputs, inputs_are_given
from hf_zipit.adapters.signature import packed
from hf_zipit.errors import SpecError
from hf_zipit.symmetry.memory import Memory, trace_key
from hf_zipit.symmetry.spaces import (
    AxisLabel,
    Block,
    Crossing,
    Factor,
    Place,
    Probe,
    ProductKey,
    Space,
    Sum,
    Symmetry,
    Trace,
    all_held,
    all_read,
    factors,
    product_key,
    products,
)
from hf_zipit.symmetry.trace import trace

__all__ = [
    "AxisLabel",
    "Block",
    "Crossing",
    "Factor",
    "MergeSpec",
    "Place",
    "Probe",
    "ProductKey",
    "Space",
    "Sum",
    "Symmetry",
    "all_held",
    "all_read",
    "factors",
    "product_key",
    "products",
]


class MergeSpec(Trace):
    """A `Trace` with the ways to make one. It depends on a model's class and configuration, not on its weights."""

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Tensor] | None = None,
        adapter: Adapter | None = None,
        *,
        folding: bool = False,
    ) -> MergeSpec:
        """Infer the spec of a model, with the adapter of its family (`auto` where none is registered).

        Args:
            model: a `PreTrainedModel`, or any module if `inputs` are given, in any dtype, on any device. Its weights
                are neither read nor copied.
            inputs: example keyword inputs, batch first and larger than one; the adapter's by default.
            folding: infer what holds of `folding.fold(model, spec.folds)`, whose residual stream can be rotated.

        Raises:
            SpecError: if the forward pass cannot be traced.
        """
        if inputs is not None or adapter is not None or inputs_are_given():
            return cls._traced(model, inputs, adapter or adapter_for(model), folding)
        return TRACES.get(trace_key(model, folding), lambda: cls._traced(model, None, adapter_for(model), folding))

    @classmethod
    def _traced(
        cls, model: nn.Module, inputs: Mapping[str, Tensor] | None, adapter: Adapter, folding: bool
    ) -> MergeSpec:
        if inputs is None:
            inputs = example_inputs(model) if inputs_are_given() else _made_up(model, adapter)
        found = trace(
            model,
            fitted(inputs, model),
            towers=adapter.towers(model),
            head=adapter.head(model),
            fields=adapter.outputs(model),
            features=adapter.features(model),
            folding=folding,
        )
        return cls(**{field.name: getattr(found, field.name) for field in fields(found)})


def _made_up(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's example inputs; raises SpecError where it does not know how."""
    try:
        return adapter.inputs(model)
    except Exception as error:  # whatever the configuration of an unknown family lacks
        raise SpecError(
            f"no example inputs can be made up for {type(model).__name__} ({error}); pass keyword arguments that its "
            "forward accepts, two samples or more, merge(..., example_inputs={...})"
        ) from error


TRACES: Memory[MergeSpec] = Memory()


def fitted(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The inputs on the device and, where they are floats, in the dtype of a model's parameters; patches `packed`."""
    inputs = packed(inputs)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return inputs

    def fit(x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # a switch, such as `use_cache`
            return x
        return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)

    return {name: fit(x) for name, x in inputs.items()}
