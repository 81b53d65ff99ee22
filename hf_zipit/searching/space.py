"""The space that is searched, in a recipe's words: every value may be a list of choices, numbers also a range.

    method: [permute, zip, zip+refit, dual]
    depth: [1.0, 0.5]
    residual: [match, identity]
    options:
      zip: {alpha: [0.1, 0.3], beta: {low: 0, high: 1}}      # for zip and zip+refit
      dual: {balance: {low: 0.1, high: 0.9}}
    refit: {own_task_weight: [0.5, 1.0]}                          # for the methods with +refit behind their names

Invariants: an option only counts for its method, so that no two settings of a grid are the same merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from hf_zipit.config import AUTO, MergeConfig
from hf_zipit.errors import RecipeError
from hf_zipit.recipe.sections import REFIT, real_method
from hf_zipit.registry import suggestion
from hf_zipit.schema import Plain, build, convert


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, whole ones where both are; drawn evenly, or evenly in their logarithms."""

    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            above = "above 0 and " if self.log else ""
            raise RecipeError(f"The range from {self.low} to {self.high} should begin {above}below its end.")


Choices = tuple[Any, ...] | Range
"""The values that one setting may have."""

Choose = Callable[[str, Choices], Any]
"""Picks one of the values of the setting that is named."""


@dataclass(frozen=True)
class Setting(Plain):
    """One point of the space.

    Attributes:
        method: as a recipe names it: with `+refit` behind the name it is followed by the refit.
        depth: the share of blocks that is merged, or a block's path.
        residual: whether the residual stream is matched.
        options: the method's.
        refit: settings of the refit; None where there is none.
    """

    method: str
    depth: float | str = 1.0
    residual: str = "match"
    options: Mapping[str, Any] = field(default_factory=dict)
    refit: Mapping[str, Any] | None = None

    def config(self, settings: Mapping[str, Any]) -> MergeConfig:
        """The config of the merge, with what a search leaves as it is."""
        return MergeConfig.of(
            settings, method=real_method(self.method), options=self.options, depth=self.depth, residual=self.residual,
            refit=AUTO if real_method(self.method) == AUTO and self.refit is None else self.refit,
        )  # fmt: skip

    def details(self) -> str:
        """Everything but method and depth, for a table: `alpha 0.3, beta 1, residual identity`."""
        named = {**self.options, **(self.refit or {})}
        if self.residual != "match":
            named["residual"] = self.residual
        return ", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in named.items())

    def __str__(self) -> str:
        depth = f"{self.depth:g}" if isinstance(self.depth, float) else self.depth
        return ", ".join(part for part in (self.method, f"depth {depth}", self.details()) if part)


@dataclass(frozen=True)
class SearchSpace:
    """What is searched; the attributes are the keys of the module's docstring.

    Attributes:
        method, depth, residual: the choices.
        options: by method, the choices of its options.
        refit: choices of the refit's settings; None where nothing is refitted but for methods with `+refit`.
    """

    method: tuple[str, ...] = ("permute", "zip")
    depth: Choices = (1.0, 0.5)
    residual: tuple[str, ...] = ("match", "identity")
    options: Mapping[str, Mapping[str, Choices]] = field(default_factory=dict)
    refit: Mapping[str, Choices] | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any] | SearchSpace | None) -> SearchSpace:
        """A space from plain values; a single value counts as a list of one.

        Raises RecipeError for an empty list, a bad range, or what no merge of the space could have.
        """
        if isinstance(content, SearchSpace):
            return content
        given = dict(content or {})
        known = [f.name for f in fields(cls)]
        for key, value in given.items():
            if key not in known:
                raise RecipeError(f"A search space has no {key!r}; {suggestion(str(key), known)}")
            if key in ("method", "depth", "residual"):
                given[key] = choices(value, key)
        if "options" in given:
            options = convert(Mapping[str, Mapping[str, Any]], given["options"], "options")
            given["options"] = {method: _all_choices(own, f"options.{method}") for method, own in options.items()}
        refit = convert(Mapping[str, Any] | bool | None, given.get("refit"), "refit")
        given["refit"] = _all_choices(refit, "refit") if isinstance(refit, Mapping) else {} if refit else None
        return cls(**given)

    def __post_init__(self) -> None:
        for key in ("method", "residual"):
            if isinstance(getattr(self, key), Range):
                raise RecipeError(f"The {key} of a search space should be a list of names, but is a range.")
        for method in self.options:
            if method not in self.method and all(method != m.removesuffix(REFIT) for m in self.method):
                raise RecipeError(f"options.{method} is for no method of the space; {suggestion(method, self.method)}")
        for method in self.method:
            ends = {name: _ends(values) for name, values in self.dimensions(method).items()}
            first = {name: values[0] for name, values in ends.items()}
            for name, values in ends.items():
                for value in values:  # a MergeConfig refuses what no merge can have
                    self.setting(method, {**first, name: value}).config({})

    def refitted(self, method: str) -> bool:
        """Whether a method is followed by the refit: as in recipes, `refit` is for all where no name asks for it."""
        marked = any(m.endswith(REFIT) for m in self.method)
        return method.endswith(REFIT) or (self.refit is not None and not marked)

    def dimensions(self, method: str) -> dict[str, Choices]:
        """What there is to choose for a method, by name: `depth`, `residual`, `zip.alpha`, `refit.own_task_weight`."""
        plain = method.removesuffix(REFIT)
        options = {**self.options.get(plain, {}), **self.options.get(method, {})}
        refit = (self.refit or {}) if self.refitted(method) else {}
        return {
            "depth": self.depth,
            "residual": self.residual,
            **{f"{plain}.{name}": values for name, values in options.items()},
            **{f"refit.{name}": values for name, values in refit.items()},
        }

    def setting(self, method: str, values: Mapping[str, Any]) -> Setting:
        """The setting with a value for each of the method's dimensions."""
        within: dict[str, dict[str, Any]] = {"refit": {}, "options": {}}
        for name, value in values.items():
            group, dot, option = name.rpartition(".")
            if dot:
                within["refit" if group == "refit" else "options"][option] = value
        refit = within["refit"] if self.refitted(method) else None
        return Setting(method, values["depth"], values["residual"], within["options"], refit)

    def draw(self, choose: Choose) -> Setting:
        """The setting that `choose` picks, dimension by dimension."""
        method = choose("method", self.method)
        return self.setting(method, {name: choose(name, values) for name, values in self.dimensions(method).items()})

    def grid(self) -> list[Setting]:
        """All settings. Raises RecipeError if the space holds a range."""
        found = []
        for method in self.method:
            dimensions = self.dimensions(method)
            for name, values in dimensions.items():
                if isinstance(values, Range):
                    raise RecipeError(f"A grid needs lists, but {name} is a range; list its values, or search by tpe.")
            points = product(*dimensions.values())
            found += [self.setting(method, dict(zip(dimensions, point, strict=True))) for point in points]
        return found


def choices(value: Any, name: str) -> Choices:
    """The values that one setting may have, from a value, a list of them or `{low, high, log}`."""
    if isinstance(value, Range):
        return value
    if isinstance(value, Mapping):
        return build(Range, value, name)
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not values:
        raise RecipeError(f"{name} is an empty list; give at least one value.")
    for one in values:
        if one is not None and not isinstance(one, (str, bool, int, float)):
            raise RecipeError(f"{name} should hold numbers, names or true and false, but holds {one!r}.")
    # An optimiser tells choices apart by their values, and 1 from 1.0 means nothing here.
    if name == "depth" or any(isinstance(one, float) for one in values):
        values = tuple(float(one) if type(one) is int else one for one in values)
    return tuple(dict.fromkeys(values))


def _all_choices(values: Mapping[str, Any], name: str) -> dict[str, Choices]:
    return {key: choices(value, f"{name}.{key}") for key, value in values.items()}


def _ends(values: Choices) -> tuple[Any, ...]:
    return (values.low, values.high) if isinstance(values, Range) else values
