"""The rules that combine the experts' weights, by name.

A rule is a pure function

    rule(tensors, labels, plan, *, base, option=default, ...) -> Tensor

of one parameter's values in all experts: float64 tensors of one shape, already in merged units. A rule on task vectors
names `base` among its parameters, and is given the tensor that the experts started from (with several bases the mean
of the aligned ones, to which every expert's own task vector was added); other rules leave it out. The other
keyword-only parameters are the rule's options.

Invariants: T copies of one tensor give that tensor; the order of the experts changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from hf_zipit.registry import RULES

BASE = "base"

Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Rule:
    """A registered rule: its name in recipes and its function."""

    name: str
    function: Callable[..., Tensor]

    @property
    def needs_base(self) -> bool:
        """Whether it combines task vectors."""
        return BASE in inspect.signature(self.function).parameters


def register(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a function a rule."""

    def decorate(function: Function) -> Function:
        RULES.add(name, Rule(name, function))
        return function

    return decorate
