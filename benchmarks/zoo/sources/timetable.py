"""Timetables: lines of 64 characters that say one moment in several notations, each in its own columns.

    2031-07-04 friday     4 july      2031 14:05 02:05pm 04/07/31 q3

Generated, so that nothing has to be installed. Almost everything is said twice; to fill a gap means to read the other
notation at its place, and sometimes to reckon (the hour, the weekday).
"""

from __future__ import annotations

from datetime import datetime, timedelta

import torch
from torch import Generator

WIDTH = 64
FIRST = datetime(1990, 1, 1)
MINUTES = 50 * 365 * 24 * 60  # the range of the moments
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# fmt: off
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)
# fmt: on
ALPHABET = " -:/0123456789abcdefghijklmnopqrstuvwxyz"


def line(moment: datetime) -> str:
    """A moment as `WIDTH` characters."""
    day, month = WEEKDAYS[moment.weekday()], MONTHS[moment.month - 1]
    half, quarter = "am" if moment.hour < 12 else "pm", (moment.month + 2) // 3
    return (
        f"{moment:%Y-%m-%d} {day:<9} {moment.day:>2} {month:<9} {moment:%Y} "
        f"{moment:%H:%M} {moment:%I:%M}{half} {moment:%d/%m/%y} q{quarter}"
    )


def lines(count: int, generator: Generator) -> list[str]:
    """Lines of random moments."""
    minutes = torch.randint(MINUTES, (count,), generator=generator).tolist()
    return [line(FIRST + timedelta(minutes=minute)) for minute in minutes]
