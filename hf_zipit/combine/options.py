"""Ranges of the rules' options: one sentence that says what was found and what is allowed."""

from __future__ import annotations

from hf_zipit.errors import RecipeError


def above(rule: str, option: str, value: float) -> None:
    """Raise RecipeError for a value that is not above 0."""
    if not value > 0:
        raise RecipeError(f"{rule}'s option {option} is {value}; it must be above 0.")


def share_of(rule: str, option: str, value: float, *, zero: bool = False) -> None:
    """Raise RecipeError for a value that is not a share: above 0 (or from 0 on, with `zero`) and at most 1."""
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        lowest = "from 0" if zero else "above 0"
        raise RecipeError(f"{rule}'s option {option} is {value}; it must be {lowest} and at most 1.")


def below_one(rule: str, option: str, value: float) -> None:
    """Raise RecipeError for a value that is not from 0 to less than 1."""
    if not 0 <= value < 1:
        raise RecipeError(f"{rule}'s option {option} is {value}; it must be from 0 to less than 1.")
