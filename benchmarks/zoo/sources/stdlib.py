"""Source code: the modules at the top of Python's standard library, of the Python that runs. Nothing to install."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path


@cache
def modules() -> tuple[str, ...]:
    """The text of every module, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return tuple(file.read_text(encoding="utf-8") for file in files)
