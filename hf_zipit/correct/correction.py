"""The corrections of a merged model, by name.

A correction is a function

    correction(merged, planned, maps, calibration, moments, *, option=default, ...) -> None

that changes the merged model in place: `planned` is the plan of the merge with its experts, `maps` those of its
spaces, `calibration` its data and `moments` the experts' moments where the merge gathered them, else None. Its
keyword-only parameters are its options; those that several corrections have:

    samples: of each task, at most; the activations of all of them at one site are held at once.
    eps: added to both variances, relative to the mean variance: bounds the rescaling of units that died.

Invariant: a model merged with itself stays that model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hf_zipit.registry import CORRECTIONS

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Correction:
    """A registered correction: its name in recipes, its function, and whether nothing may come after it."""

    name: str
    function: Callable[..., None]
    last: bool = False


def register(name: str, *, last: bool = False) -> Callable[[Function], Function]:
    """Decorator that makes a function a correction.

    Args:
        last: whether it rests on the trunk's statistics, which another correction would change afterwards.
    """

    def decorate(function: Function) -> Function:
        CORRECTIONS.add(name, Correction(name, function, last))
        return function

    return decorate
