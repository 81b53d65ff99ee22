"""Rules that have another rule's name as an option, mostly `after`: they go on from what it makes of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_zipit.combine.rule import Rule, Survey, Vectors
from hf_zipit.errors import RecipeError
from hf_zipit.registry import RULES, check_options, options_of


def inner(
    own: str, after: str, options: Mapping[str, Any] | None, option: str = "after"
) -> tuple[Rule, dict[str, Any]]:
    """The rule that comes first, and its options.

    Args:
        own: the name of the rule that comes after it.
        option: that one's option that names the first.

    Raises:
        RecipeError: there is none such, it has no such options, it comes after another one itself or reads data.
    """
    rule = RULES.get(after)
    if "after" in options_of(rule.function) or rule.needs_data:
        raise RecipeError(
            f"{own}'s option {option} is {after!r}; name the rule of weights alone that it goes on from."
        )
    return rule, check_options(after, rule.function, options or {})


def surveyed(own: str) -> Survey:
    """The survey of such a rule: what the other rule's survey finds."""

    def survey(vectors: Vectors, *, after: str, options: Mapping[str, Any] | None, **other: Any) -> Any:
        rule, known = inner(own, after, options)
        return rule.survey_of(vectors, known)

    return survey
