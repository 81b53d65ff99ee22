"""The Collaborative International Dictionary of English (GCIDE, on Webster's of 1913), from Debian's `dict-gcide`."""

from __future__ import annotations

import gzip
import re
from functools import cache
from pathlib import Path

FILE = Path("/usr/share/dictd/gcide.dict.dz")
HEADWORDS = re.compile(r"\n(?=\S)")  # all else of an entry is indented
SOURCES = re.compile(r"\[(?:1913 Webster|WordNet|PJC|Century|Webster)[^\]]*\]")


@cache
def entries() -> tuple[str, ...]:
    """The dictionary's entries, each on one line, without the notes on where a meaning was taken from.

    A few bytes of it are no UTF-8; they are left out.

    Raises:
        FileNotFoundError: the dictionary is not installed.
    """
    if not FILE.exists():
        raise FileNotFoundError(f"{FILE} was not found: install the package `dict-gcide`.")
    with gzip.open(FILE, "rt", encoding="utf-8", errors="ignore") as file:
        found = HEADWORDS.split(file.read())
    return tuple(" ".join(SOURCES.sub("", entry).split()) for entry in found if "[1913 Webster]" in entry)
