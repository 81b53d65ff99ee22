"""The rules that merge LoRA updates in their factors, by name.

A rule is a pure function

    rule(updates, given, *, option=default, ...) -> {layer: Factors}

of all layers' updates: by layer one `Factors` for each expert, in the experts' order, scaled as the adapter scales
them. An expert without an update of a layer has one of rank 0. `given` says the tasks and the seed and, for rules that
are registered with `needs_data=True`, what the layers are fed (`Given`). The keyword-only parameters are the rule's
options.

Invariants: experts that learnt nothing give nothing; the order of the experts changes nothing; no tensor is larger
than the factors, stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from hf_zipit.lora.factors import Factors
from hf_zipit.registry import LORA_RULES

Updates = Mapping[str, Sequence[Factors]]

LoraFunction = TypeVar("LoraFunction", bound=Callable[..., dict[str, Factors]])


@dataclass(frozen=True)
class Given:
    """What a rule is given beside the updates.

    Attributes:
        tasks: the experts' names, in order.
        seed: for rules that draw.
        moments: by layer and expert E[z z^T] with z = A_all x, `[K, K]`: x is what the layer reads in the expert on
            its own task's data, A_all all experts' A below each other, K the sum of their ranks. Empty without data.
    """

    tasks: tuple[str, ...]
    seed: int = 0
    moments: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraRule:
    """A registered rule: its name, its function, and whether it reads data."""

    name: str
    function: Callable[..., dict[str, Factors]]
    needs_data: bool = False

    def merge(self, updates: Updates, given: Given, options: Mapping[str, Any]) -> dict[str, Factors]:
        """The merged update of every layer."""
        return self.function(updates, given, **options)


def register(name: str, *, needs_data: bool = False) -> Callable[[LoraFunction], LoraFunction]:
    """Decorator that makes a function a rule for LoRA updates; see `hf_zipit/lora/rule.py`."""

    def decorate(function: LoraFunction) -> LoraFunction:
        LORA_RULES.add(name, LoraRule(name, function, needs_data))
        return function

    return decorate
