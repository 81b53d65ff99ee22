"""Packages whose names are imported when they are first used (PEP 562), so that importing them costs next to nothing.

A package says what it has once, in the `from ... import ... as ...` lines of the stub `__init__.pyi` beside it, where
type checkers and editors look.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(
    package: str, file: str
) -> tuple[dict[str, tuple[str, str]], Callable[[str], Any], Callable[[], list[str]]]:
    """A package's HOMES (by name the module, and the name in there), `__getattr__` and `__dir__`.

    Args:
        package, file: its `__name__` and `__file__`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname: (line.module, alias.name) for line in lines for alias in line.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = homes[name]
        found = getattr(__import__(module, fromlist=[original]), original)
        setattr(sys.modules[package], name, found)
        return found

    return homes, get, lambda: sorted({*vars(sys.modules[package]), *homes})
