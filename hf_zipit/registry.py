"""The registry: names for everything that can be chosen, filled by one package of ours and by other people's packages.

Methods, rules, corrections and adapters register themselves when their modules are imported. At the first look-up the
registry imports all modules of its package, so that adding one is adding one file, and then what installed packages
announce under its entry point group, so that third parties add theirs without a change here. What is chosen takes
options: they are the keyword-only parameters of its function. Its signature is its schema.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from hf_zipit.errors import NameTakenError, RecipeError

logger = logging.getLogger(__name__)

T = TypeVar("T")

KINDS: dict[type, tuple[str, Any]] = {
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", (int, float)),
    str: ("a word", str),
}
"""By the type of an option's default what its values must be."""

GIVEN = ("base", "whole", "generator", "grams", "fisher", "layer")
"""Keyword-only parameters of rules that no option sets: see `hf_zipit.combine.rule`."""


class Registry(Generic[T]):
    """Names and what they stand for.

    Args:
        kind: what is registered, for error messages: `"method"`, `"rule"`.
        package: the package whose modules register themselves, such as `"hf_zipit.align.methods"`.
        group: the entry point group under which other packages announce modules that register more.
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind = kind
        self.package = package
        self.group = group
        self._entries: dict[str, T] = {}
        self._found = False

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; raises NameTakenError when the name is taken: a mistake in the code, not in a recipe."""
        if name in self._entries:
            raise NameTakenError(f"There are two {self.kind}s named {name!r}; rename one of them.")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """What `name` stands for; raises RecipeError with the nearest name when there is no such thing."""
        if name not in self:
            raise RecipeError(f"There is no {self.kind} named {name!r}; {suggestion(name, self.names())}")
        return self._entries[name]

    def find(self, name: str) -> T | None:
        """What `name` stands for; None when there is no such thing."""
        self._find()
        return self._entries.get(name)

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted."""
        self._find()
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._find()
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _find(self) -> None:
        if self._found:
            return
        package = importlib.import_module(self.package)
        for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self.package}.{module}")
        # Only now: an import that failed must fail again at the next look-up, not leave half a registry behind.
        self._found = True
        for plugin in sorted(entry_points(group=self.group), key=lambda plugin: (plugin.name, plugin.value)):
            try:
                plugin.load()
            except NameTakenError as error:  # whose of the two is meant cannot be told, now or at the next look-up
                self._found = False
                raise NameTakenError(f"The plugin {plugin.value} cannot be used: {error}") from error
            except Exception as error:  # somebody else's code may raise anything; ours must go on without it
                logger.warning("The %s of the plugin %s was not loaded: %s", self.kind, plugin.value, error)


METHODS: Registry[Any] = Registry("method", "hf_zipit.align.methods", "hf_zipit.methods")
"""Alignment methods: `hf_zipit.align.method.Method`."""

RULES: Registry[Any] = Registry("rule", "hf_zipit.combine.rules", "hf_zipit.rules")
"""Combining rules: `hf_zipit.combine.rule.Rule`."""

LORA_RULES: Registry[Any] = Registry("LoRA rule", "hf_zipit.lora.rules", "hf_zipit.lora_rules")
"""Rules that merge adapters in their factors: `hf_zipit.lora.rule.LoraRule`."""

CORRECTIONS: Registry[Any] = Registry("correction", "hf_zipit.correct", "hf_zipit.corrections")
"""Corrections of merged models: `hf_zipit.correct.correction.Correction`."""

TRAININGS: Registry[Any] = Registry("kind of polish", "hf_zipit.polish.kinds", "hf_zipit.trainings")
"""What a training may change: `hf_zipit.polish.kind.PolishKind`."""

ADAPTERS: Registry[Any] = Registry("adapter", "hf_zipit.adapters", "hf_zipit.adapters")
"""Adapters by the `model_type` of the configurations they serve: `hf_zipit.adapters.auto.Adapter`."""

RESIDUES: Registry[Any] = Registry("kind of residue", "hf_zipit.modeling.kinds", "hf_zipit.residues")
"""Kinds of residues: classes derived from `hf_zipit.modeling.residue.Residue`."""

ROUTERS: Registry[Any] = Registry("router", "hf_zipit.residues.routers", "hf_zipit.routers")
"""What finds out what a sample needs where no task is named: `hf_zipit.residues.routing.RouterKind`."""

CONVERSIONS: Registry[Any] = Registry("conversion", "hf_zipit.assembly", "hf_zipit.conversions")
"""What a task of a merged model can be made into, `(model, task) -> model`: `hf_zipit.assembly.disassemble`."""


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a method, by name: the keyword-only parameters of its function, but what a rule is given."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in GIVEN}


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as a dict; raises RecipeError for one that `function`, registered as `name`, does not have, and for a
    value of another kind than the default."""
    if not isinstance(options, Mapping):
        raise RecipeError(f"The options of {name!r} are {options!r}; they must be a mapping of names to values.")
    known = options_of(function)
    for option, value in options.items():
        if option not in known:
            hint = suggestion(option, known) if known else "it takes none."
            raise RecipeError(f"{name!r} has no option {option!r}; {hint}")
        kind = KINDS.get(type(known[option].default))
        if kind is not None and not (isinstance(value, kind[1]) and isinstance(value, bool) == (kind[1] is bool)):
            raise RecipeError(f"The option {option} of {name!r} is {value!r}; it must be {kind[0]}.")
    return dict(options)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name nearest to `word`, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known) or '(none)'}."
