"""The rules that combine the experts' weights, by name.

A rule is a pure function

    rule(tensors, label_axes, alignment, spec, *, option=default, ...) -> Tensor

of one parameter's or buffer's values in all experts. What it `needs` tells the earlier stages what else to bring,
such as `"base"` for rules on task vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from hf_zipit.registry import RULES

Rule = TypeVar("Rule", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Combiner:
    """A registered rule: its name in recipes, its function (keyword-only parameters are options), its needs."""

    name: str
    function: Callable[..., Any]
    needs: frozenset[str] = frozenset()


def register(name: str, *, needs: frozenset[str] | set[str] = frozenset()) -> Callable[[Rule], Rule]:
    """Decorator that makes a function a rule of this room."""

    def decorate(function: Rule) -> Rule:
        RULES.add(name, Combiner(name, function, frozenset(needs)))
        return function

    return decorate
