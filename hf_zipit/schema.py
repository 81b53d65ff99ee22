"""Dataclasses as a schema: plain values from a YAML file <-> typed, frozen dataclasses, with errors a person can use.

The field's type is its rule. Whole numbers are taken where numbers are asked for, a single value where a tuple is
asked for, and strings as paths; nothing else is converted, for a wrong type in a recipe is most often a slip.
"""

from __future__ import annotations

import json
import math
import reprlib
import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hf_zipit.errors import RecipeError
from hf_zipit.registry import suggestion

T = TypeVar("T")

LARGEST = 2**63 - 1

BRIEF = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = 120
BRIEF.maxlevel = 3

NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping; a key that is given twice is an error, where YAML itself would keep the last.

    Raises RecipeError if there is no such file, it is no YAML, or it holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}; name an existing YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except RecursionError as error:
        raise RecipeError(f"The recipe {path} nests too deeply.") from error
    except Exception as error:  # PyYAML raises more than its own errors
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise RecipeError(f"The recipe {path}{line} is no valid YAML: {_problem(error)}.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"The recipe {path} holds {shown(content)}, but a recipe is a mapping of keys to values.")
    return content


def _problem(error: Exception) -> str:
    lines = (getattr(error, "problem", None) or str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error, and one that is a list; values that are none are told by line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # month 13, 5,000 digits, !!int of a text
            told = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark) from error


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            told = "a key is a list or a mapping, but must be a word"
            raise yaml.constructor.ConstructorError(None, None, told, key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def build(schema: type[T], content: Any, where: str = "") -> T:
    """An instance of the dataclass `schema` from a mapping, whose path in the file is `where`, as `"experts.shoes"`.

    Raises RecipeError for an unknown key, a missing one or a value of a wrong type.
    """
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where or 'the recipe'} should be a mapping of keys to values, but is {shown(content)}.")
    hints = get_type_hints(schema)
    known = {field.name: field for field in fields(schema) if field.init}
    for key in content:
        if key not in known:
            raise RecipeError(f"{_under(where, key)} is no known key; {suggestion(str(key), known)}")
    for name, field in known.items():
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{_under(where, name)} is missing; give {describe(hints[name])}.")
    return schema(**{key: convert(hints[key], value, _under(where, key)) for key, value in content.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; raises RecipeError if it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if is_dataclass(hint):
        return build(hint, value, where)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, where)
        return {
            convert(arguments[0], key, f"the key {key!r} of {where}"): convert(arguments[1], item, _under(where, key))
            for key, item in value.items()
        }
    if hint is Path and isinstance(value, str) and value:
        try:
            return Path(value).expanduser()
        except RuntimeError:  # the home of nobody
            raise _wrong(hint, value, where) from None
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a text
        except (ValueError, OverflowError):
            raise _wrong(hint, value, where) from None
    if hint is int and isinstance(value, int) and abs(value) > LARGEST:
        raise _wrong(hint, value, where)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(hint, value, where)


def _one_of(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first option that `value` fits; if it fits none and only one is a section, that section's own error."""
    if value is None and type(None) in options:
        return None
    sections = [option for option in options if is_dataclass(option)]
    if len(sections) == 1 and isinstance(value, Mapping):
        return build(sections[0], value, where)
    for option in options:
        try:
            return convert(option, value, where)
        except RecipeError:
            continue
    raise _wrong(Union[options], value, where)  # noqa: UP007 - a union of a tuple


def describe(hint: Any) -> str:
    """A type in words: `a whole number`, `a text or a list of texts`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in arguments if option is not type(None)))
    if origin is tuple:
        return f"{describe(arguments[0])} or a list of such"
    if origin is not None or is_dataclass(hint):
        return "a mapping of keys to values"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


class Plain:
    """A dataclass that gives itself as plain values."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON knows them."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}


def plain(value: Any) -> Any:
    """A value as JSON knows it, nested ones included; numbers that are not finite become None."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wrong(hint: Any, value: Any, where: str) -> RecipeError:
    return RecipeError(f"{where} should be {describe(hint)}, but is {shown(value)}.")


def shown(value: Any) -> str:
    """A value of a file in an error's sentence: in a few words, however large it is."""
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    return f"the list {brief(list(value))}" if isinstance(value, (list, tuple)) else brief(value)


def brief(value: Any) -> str:
    """What a value looks like, or the start of it."""
    try:
        return BRIEF.repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return "a number of very many digits"


def _under(where: str, key: Any) -> str:
    name = key if isinstance(key, str) else brief(key)
    return f"{where}.{name}" if where else name


def packed(value: Any) -> str:
    """Plain values as one line of text: a configuration file puts every number of a list on a line of its own."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def unpacked(text: Any) -> Any:
    """The values of `packed`; values that were never packed as they are."""
    return json.loads(text) if isinstance(text, str) else text
