"""Notations: one number, or one date, written in several ways that say the same.

    419, four hundred nineteen, CDXIX
    2031-07-04, july 4 2031, 04.07.31, 4.VII.2031

Generated, so that nothing has to be installed.
"""

from __future__ import annotations

from datetime import date, timedelta

from benchmarks.zoo.sources import numerals, timetable

NUMBERS = range(1, 4000)
DAYS = range(50 * 365)  # from the first of 1990, so that two digits tell the year
WORDS = (*numerals.SMALL, *numerals.TENS, "hundred", "thousand", *timetable.MONTHS)
SIGNS = " -.0123456789CDILMVX"


def number(value: int) -> dict[str, str]:
    """A number from 1 to 3999, by notation."""
    return {"digits": str(value), "words": numerals.words(value), "roman": numerals.roman(value).upper()}


def day(value: int) -> dict[str, str]:
    """The day that is so many days after the first of 1990, by notation."""
    when = date(1990, 1, 1) + timedelta(days=value)
    return {
        "iso": f"{when:%Y-%m-%d}",
        "long": f"{timetable.MONTHS[when.month - 1]} {when.day} {when.year}",
        "short": f"{when:%d.%m.%y}",
        "mixed": f"{when.day}.{numerals.roman(when.month).upper()}.{when.year}",
    }
