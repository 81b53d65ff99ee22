"""The rules that combine the experts' weights, by name.

A rule is a pure function

    rule(tensors, labels, plan, *, base, whole, generator, option=default, ...) -> Tensor

of one parameter's values in all experts: float64 tensors of one shape, already in merged units. What it names among
its keyword-only parameters it is given:

- `base`: the tensor that the experts started from (with several bases the mean of the aligned ones, to which every
  expert's own task vector was added). Rules on task vectors need it, others read none.
- `whole`: what the rule's survey found in all parameters together, for rules that are defined over the flattened
  model (the share of the largest entries). It is None where a tensor stands alone: the rule then surveys that one.
- `grams`, `fisher`: by expert E[x x^T] of what the parameter's layer reads on the expert's own data, `[in, in]` (of a
  norm's scale E[x^2], `[units]`), and the diagonal of the parameter's Fisher information. None where the parameter is
  no layer's weight. See `hf_zipit.observation.statistics`.
- `layer`: the same of the model that is *merged so far*, beside the experts' (`hf_zipit.combine.layers.Layer`). Layers
  are then merged in the order they run (`hf_zipit.layerwise`). None where the parameter is no layer's weight or bias.
- `generator`: seeded by the config's seed and the parameter's name, for rules that draw: the same settings give the
  same bytes.

All other keyword-only parameters are the rule's options. What is only counted and never trained, such as BatchNorm's
running statistics, is no matter of rules: it is averaged.

Invariants: experts that learnt nothing give the base; where nothing is drawn, the order of the experts changes
nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from hf_zipit.registry import GIVEN, RULES, options_of

BASE = "base"

Function = TypeVar("Function", bound=Callable[..., Tensor])

Vectors = Iterable[Sequence[Tensor]]
"""The experts' task vectors (without a base their weights), parameter by parameter, of elementwise rules part by part;
may be read more than once."""

Survey = Callable[..., Any]
"""`survey(vectors, **options)`, all of the rule's options: what it wants to know of all `Vectors` beforehand."""


@dataclass(frozen=True)
class Rule:
    """A registered rule: its name in recipes, its function, and its survey if it has one.

    `elementwise`: after the survey it combines every entry by itself, so that it may be given a part of a tensor.
    """

    name: str
    function: Callable[..., Tensor]
    survey: Survey | None = None
    elementwise: bool = False

    @cached_property
    def wants(self) -> frozenset[str]:
        """What it is given."""
        return frozenset(GIVEN) & inspect.signature(self.function).parameters.keys()

    @property
    def needs_base(self) -> bool:
        """Whether it combines task vectors."""
        return BASE in self.wants

    @property
    def needs_data(self) -> bool:
        """Whether it reads what layers are fed."""
        return bool(self.wants & {"grams", "fisher", "layer"})

    @property
    def layerwise(self) -> bool:
        """Whether it merges a layer on what the merged layers before it compute."""
        return "layer" in self.wants

    def survey_of(self, vectors: Vectors, options: Mapping[str, Any]) -> Any:
        """What it wants to know of all parameters, None where it has no survey."""
        if self.survey is None:
            return None
        defaults = {name: option.default for name, option in options_of(self.function).items()}
        return self.survey(vectors, **{**defaults, **options})

    def combine(
        self, tensors: Sequence[Tensor], labels: Any, plan: Any, options: Mapping[str, Any], **given: Any
    ) -> Tensor:
        """The merged tensor; of what is `given`, the function gets what it names among its parameters."""
        wanted = {name: value for name, value in given.items() if name in self.wants}
        return self.function(tensors, labels, plan, **wanted, **options)


def register(name: str, *, survey: Survey | None = None, elementwise: bool = False) -> Callable[[Function], Function]:
    """Decorator that makes a function a rule; see `Rule`."""

    def decorate(function: Function) -> Function:
        RULES.add(name, Rule(name, function, survey, elementwise))
        return function

    return decorate


def task_vectors(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """What every expert learnt: its tensor less the base's."""
    return [tensor - base for tensor in tensors]
