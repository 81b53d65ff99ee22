"""Numerals: lines of 64 characters that write one number below a thousand in several notations, each in its columns.

    419 four hundred nineteen       cdxix        0643 1a3 0110100011

Decimal, in words, Roman, octal, hexadecimal and binary. Generated, so that nothing has to be installed. Words and
Roman numerals reach up to 3999.
"""

from __future__ import annotations

import torch
from torch import Generator

WIDTH = 64
# fmt: off
SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ROMAN = (
    (1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"),
    (9, "ix"), (5, "v"), (4, "iv"), (1, "i"),
)
# fmt: on


def words(number: int) -> str:
    """A number below twenty thousand in English."""
    if number < 20:
        return SMALL[number]
    if number < 100:
        return TENS[number // 10 - 2] + ("" if number % 10 == 0 else f" {SMALL[number % 10]}")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    return f"{SMALL[number // size]} {name}" + ("" if number % size == 0 else f" {words(number % size)}")


def roman(number: int) -> str:
    """A number below four thousand in Roman numerals; nothing for zero."""
    found = ""
    for value, letters in ROMAN:
        found += letters * (number // value)
        number %= value
    return found


def line(number: int) -> str:
    """A number as `WIDTH` characters."""
    return f"{number:03d} {words(number):<27} {roman(number):<12} {number:04o} {number:03x} {number:010b}"


def lines(count: int, generator: Generator) -> list[str]:
    """Lines of random numbers."""
    return [line(number) for number in torch.randint(1000, (count,), generator=generator).tolist()]
