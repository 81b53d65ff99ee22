"""Rows of a results page that stay while others are measured anew: whole tables take hours, one method minutes.

A row keeps its text, so that no figure changes that was not measured. Which code made it stands in its last column;
rows from before there was such a column are marked `earlier`: made by a version that the page's head lists and that no
row names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

EARLIER = "earlier"

Key = tuple[str, str]
"""Method and depth, as they stand in the table."""


def tables(page: str) -> dict[str, dict[Key, dict[str, str]]]:
    """By pair and by method and depth: the cells of a row, by the heads of its table."""
    found: dict[str, dict[Key, dict[str, str]]] = {}
    for section in page.split("\n## ")[1:]:
        name, *lines = section.splitlines()
        heads: list[str] = []
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[:2] == ["method", "depth"]:
                heads = cells
            elif heads and len(cells) == len(heads) and not cells[0].startswith("---"):
                row = dict(zip(heads, cells, strict=True))
                row.setdefault("sources", EARLIER)
                found.setdefault(name.strip(), {})[row["method"], row["depth"]] = row
    return found


def joined(
    new: Iterable[Mapping[str, str]], kept: Mapping[Key, Mapping[str, str]], methods: Sequence[str]
) -> list[Mapping[str, str]]:
    """A table's rows: new ones in place of those of the same method and depth; by the order of methods, then depth."""
    rows = {**kept, **{(row["method"], row["depth"]): row for row in new}}

    def place(key: Key) -> tuple[int, float]:
        method, depth = key
        return methods.index(method), -float(depth) if depth != "-" else 0.0

    return [rows[key] for key in sorted(rows, key=place)]


def digests(page: str) -> list[str]:
    """The versions of the sources that the page's head lists."""
    return re.findall(r"`(\w+)`", _head(page)[1])


def machines(page: str) -> list[str]:
    """Where its rows were measured."""
    return [each for each in _head(page)[0].split("; or ") if each]


def _head(page: str) -> tuple[str, str]:
    """Machines and versions, as the head lists them."""
    listed = re.search(r"^Machine: (.*)\. hf_zipit \S+, sources (.*)\.$", page, re.MULTILINE)
    return (listed[1], listed[2]) if listed else ("", "")


def others(page: str, names: Iterable[str]) -> str:
    """The sections of other names: of other things, written elsewhere."""
    sections = page.split("\n## ")[1:]
    left = [each for each in sections if each.partition("\n")[0].strip() not in {*names}]
    return "".join(f"\n## {each.rstrip()}\n" for each in left)
