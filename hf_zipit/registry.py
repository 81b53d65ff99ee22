"""A room's registry: a name for everything that can be chosen there, filled by the room's own files.

A room is a package (`hf_zipit.align`, `hf_zipit.combine`, ...) whose modules register what they define when they are
imported. The registry imports all of them at the first look-up, so that adding a method is adding one file and nothing
else. A method's options are the keyword-only parameters of its function: its signature is its schema.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from hf_zipit.errors import RecipeError

T = TypeVar("T")

KINDS: dict[type, tuple[str, Any]] = {
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", (int, float)),
    str: ("a word", str),
}
"""By the type of an option's default what its values must be."""


class Registry(Generic[T]):
    """Names and what they stand for, found in the modules of one package.

    Args:
        kind: what is registered, for error messages: `"method"`, `"combiner"`.
        room: the package whose modules register themselves, such as `"hf_zipit.align"`.
    """

    def __init__(self, kind: str, room: str):
        self.kind = kind
        self.room = room
        self._entries: dict[str, T] = {}
        self._found = False

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; raises ValueError when the name is taken: a mistake in the code, not in a recipe."""
        if name in self._entries:
            raise ValueError(f"There are two {self.kind}s named {name!r} in {self.room}; rename one of them.")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """What `name` stands for; raises RecipeError with the nearest name when there is no such thing."""
        self._find()
        if name not in self._entries:
            raise RecipeError(f"There is no {self.kind} named {name!r}; {suggestion(name, self.names())}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted."""
        self._find()
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._find()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _find(self) -> None:
        if self._found:
            return
        package = importlib.import_module(self.room)
        for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self.room}.{module}")
        # Only now: an import that failed must fail again at the next look-up, not leave half a room behind.
        self._found = True


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a method, by name: the keyword-only parameters of its function."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as a dict; raises RecipeError for one that `function`, registered as `name`, does not have, and for a
    value of another kind than the default."""
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
