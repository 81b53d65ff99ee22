"""Glosses of WordNet 3 (Miller, 1995), from Debian's `wordnet-base` or any folder with `data.noun`, `data.verb`, ...

A gloss is a definition, often followed by quoted examples: `a hole where a knot came out; "the board has a knothole"`.
Every noun synset belongs to one lexicographer file, a coarse meaning such as *animal* or *artifact*.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDERS = ("/usr/share/wordnet", "/usr/local/WordNet-3.0/dict", "/usr/local/share/wordnet")
# fmt: off
NOUN_FILES = (
    "tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
)
# fmt: on
"""The lexicographer files of nouns, in the order of their numbers, which start at 3."""


@dataclass(frozen=True)
class Gloss:
    """One synset's gloss: the text as it stands, the definition alone, and the number of its lexicographer file."""

    text: str
    definition: str
    file: int

    @property
    def noun_file(self) -> str:
        return NOUN_FILES[self.file - 3]


def folder() -> Path:
    """The folder of the database: `$WORDNET_FOLDER` or a usual place.

    Raises:
        FileNotFoundError: WordNet is not installed.
    """
    named = os.environ.get("WORDNET_FOLDER")
    for candidate in map(Path, (named,) if named else FOLDERS):
        if (candidate / "data.noun").exists():
            return candidate
    raise FileNotFoundError(
        f"WordNet was not found in {named or ', '.join(FOLDERS)}: install the package `wordnet-base`, or set "
        "WORDNET_FOLDER to a folder that holds `data.noun`."
    )


@cache
def glosses(part: str) -> tuple[Gloss, ...]:
    """All glosses of `"noun"`, `"verb"`, `"adj"` or `"adv"`, in the database's order, each text once."""
    with open(folder() / f"data.{part}", encoding="utf-8") as lines:
        # The licence at the top is indented; a synset's line starts with its offset and its file's number.
        found = (_gloss(line) for line in lines if not line.startswith(" "))
        return tuple({gloss.definition: gloss for gloss in found}.values())


def _gloss(line: str) -> Gloss:
    entry, text = line.split(" | ", 1)
    text = text.strip()
    definition = text.split('"', 1)[0].strip(" ;:-") or text
    return Gloss(text, definition, int(entry.split(" ", 2)[1]))
