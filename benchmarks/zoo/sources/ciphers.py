"""Ciphers of WordNet's verbs, one a cell of 16 characters: `weep  peew  jrrc  eepw`.

The word, its letters in reverse, every letter 13 places further in the alphabet, and its letters in their order.
"""

from __future__ import annotations

import codecs

from benchmarks.zoo.sources import inflections

CELL = 16
WIDTH = 4 * CELL


def line(word: str) -> str:
    """A word of small letters and its ciphers in their cells, `WIDTH` characters."""
    cells = word, word[::-1], codecs.encode(word, "rot13"), "".join(sorted(word))
    return "".join(cell.ljust(CELL) for cell in cells)


def lines() -> list[str]:
    """One line for every verb of `inflections.lines`, in the same order."""
    return [line(forms.split(None, 1)[0]) for forms in inflections.lines()]
