"""Timetables: lines of 64 characters that say a moment and a journey in several notations, each in its own columns.

    2031-07-04 friday    4 july      31 185 14:05 02:05pm  97 >15:42

Generated, so that nothing has to be installed. Almost everything is said twice; to fill a gap means to read the other
notation at its place, and sometimes to reckon (the weekday, the day of the year, the time of arrival).
"""

from __future__ import annotations

from datetime import datetime, timedelta

import torch
from torch import Generator

WIDTH = 64
FIRST = datetime(1990, 1, 1)
MINUTES = 50 * 365 * 24 * 60  # the range of the moments
JOURNEY = 180  # minutes, at most
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# fmt: off
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)
# fmt: on
ALPHABET = " -:>0123456789abcdefghijklmnopqrstuvwxyz"


def line(start: datetime, minutes: int) -> str:
    """A departure and a journey as `WIDTH` characters."""
    day, month, end = WEEKDAYS[start.weekday()], MONTHS[start.month - 1], start + timedelta(minutes=minutes)
    half = "am" if start.hour < 12 else "pm"
    return (
        f"{start:%Y-%m-%d} {day:<9}{start.day:>2} {month:<10}{start:%y} {start:%j} "
        f"{start:%H:%M} {start:%I:%M}{half} {minutes:>3} >{end:%H:%M}"
    )


def lines(count: int, generator: Generator) -> list[str]:
    """Random lines."""
    starts = torch.randint(MINUTES, (count,), generator=generator).tolist()
    journeys = torch.randint(1, JOURNEY + 1, (count,), generator=generator).tolist()
    return [line(FIRST + timedelta(minutes=start), journey) for start, journey in zip(starts, journeys, strict=True)]
