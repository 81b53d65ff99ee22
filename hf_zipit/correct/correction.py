"""The corrections of a merged model, by name.

A correction is a function

    correction(merged, experts, planned, alignment, batches, *, option=default, ...) -> None

that changes the merged model in place: `experts` are the models by task, `planned` is the plan of the merge,
`alignment` holds its maps and `batches` the calibration data (`hf_zipit.data.batches.Batches`). Its keyword-only
parameters are its options. What must hold: a model merged with itself stays that model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_zipit.errors import RecipeError
from hf_zipit.registry import CORRECTIONS, check_options

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Correction:
    """A registered correction: its name in recipes, its function, and whether nothing may come after it."""

    name: str
    function: Callable[..., None]
    last: bool = False


def register(name: str, *, last: bool = False) -> Callable[[Function], Function]:
    """Decorator that makes a function a correction of this room.

    Args:
        last: whether it rests on the trunk's statistics, which another correction would change afterwards.
    """

    def decorate(function: Function) -> Function:
        CORRECTIONS.add(name, Correction(name, function, last))
        return function

    return decorate


def check_corrections(
    corrections: Sequence[str] | Mapping[str, Mapping[str, Any] | None],
) -> dict[str, dict[str, Any]]:
    """The options of every correction by its name, in the order in which they are applied.

    Args:
        corrections: names, or names with options: `("batchnorm-reset",)`, `{"rescale-shift": {"samples": 128}}`.

    Raises:
        RecipeError: if one is unknown, given twice or out of place, or has no such option.
    """
    if isinstance(corrections, str):
        corrections = (corrections,)
    given = dict(corrections) if isinstance(corrections, Mapping) else dict.fromkeys(corrections)
    if len(given) < len(corrections):
        raise RecipeError(f"corrections names one twice in {list(corrections)}; each is applied once.")
    for position, name in enumerate(given, start=1):
        if CORRECTIONS.get(name).last and position < len(given):
            raise RecipeError(
                f"{name!r} must be the last of the corrections {list(given)}: the others change what it sees."
            )
    functions = {name: CORRECTIONS.get(name).function for name in given}
    return {name: check_options(name, functions[name], options or {}) for name, options in given.items()}
