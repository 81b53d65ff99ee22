"""Where labels are, in data and in what a Trainer hands over, and which of them count."""

from __future__ import annotations

from typing import Any

LABEL_COLUMNS = ("labels", "label")

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""


def first(value: Any) -> Any:
    """The first of several outputs or labels; a Trainer gives a tuple where there are several."""
    return value[0] if isinstance(value, (tuple, list)) else value
