"""Inflected forms of WordNet's verbs, one form a cell of 16 characters: `weep  weeps  wept  weeping`.

The forms follow the spelling rules of English; where WordNet's list of exceptions (`verb.exc`) has others, as for
irregular verbs and doubled consonants, those are taken.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache

from benchmarks.zoo.sources import wordnet

CELL = 16
FORMS = 4
WIDTH = FORMS * CELL
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"


def forms(verb: str, exceptions: tuple[str, ...] = ()) -> tuple[str, str, str, str]:
    """A verb's base form, third person, past and present participle.

    Args:
        exceptions: forms to prefer to the rules': the first that ends in -ing, and the first that does not.
    """
    soft = verb.endswith("y") and verb[-2:-1] not in VOWELS
    stem = verb[:-1] if verb.endswith("e") else verb
    third = verb[:-1] + "ies" if soft else verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
    past = next((form for form in exceptions if not form.endswith("ing")), verb[:-1] + "ied" if soft else stem + "ed")
    kept = verb if verb.endswith(("ee", "oe", "ye")) else stem
    participle = next((form for form in exceptions if form.endswith("ing")), kept + "ing")
    return verb, third, past, participle


def line(verb: str, exceptions: tuple[str, ...] = ()) -> str:
    """The forms in their cells, `WIDTH` characters."""
    return "".join(form.ljust(CELL) for form in forms(verb, exceptions))


@cache
def lines() -> tuple[str, ...]:
    """One line for every verb of letters alone whose forms all fit, in the database's order.

    Raises:
        FileNotFoundError: WordNet is not installed.
    """
    exceptions = defaultdict(list)
    for entry in (wordnet.folder() / "verb.exc").read_text(encoding="utf-8").splitlines():
        form, verb = entry.split()[:2]
        exceptions[verb].append(form)
    index = (wordnet.folder() / "index.verb").read_text(encoding="utf-8").splitlines()
    verbs = [entry.split(" ", 1)[0] for entry in index if not entry.startswith(" ")]
    found = (line(verb, tuple(exceptions[verb])) for verb in verbs if verb.isalpha() and verb.isascii())
    return tuple(entry for entry in found if len(entry) == WIDTH and entry[CELL - 1 :: CELL].isspace())
