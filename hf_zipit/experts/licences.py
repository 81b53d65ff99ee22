"""The licence of a merged model, worked out from those of its experts; nothing is claimed where that is not plain.

A merge is made of all its experts' weights, so its licence must ask for all that each of theirs does. The table below
holds licences in the order in which one may be met by going over to a later one of the same row; who merges still has
to pass on the notices of all. It is no legal advice, and knows only what is commonly held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PERMISSIVE = ("cc0-1.0", "unlicense", "0bsd", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")

ROWS = (
    (*PERMISSIVE, "lgpl-3.0", "gpl-3.0", "agpl-3.0"),
    (*PERMISSIVE, "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    ("cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
)
"""Each row is a chain: what is under a licence of it may be part of something under any later one."""


def merged_licence(experts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The licence of what is merged of experts, by task what `Origin.to_dict` gave, as metadata of a card.

    It is the one that all have, or the first that all may go over to; empty if one is unknown or they do not go
    together.
    """
    licences = [dict(expert.get("licence", {})) for expert in experts.values()]
    if not licences or not all(licence.get("license") for licence in licences):
        return {}
    if all(licence == licences[0] for licence in licences):
        return licences[0]
    names = {licence["license"] for licence in licences}
    row = next((row for row in ROWS if names <= set(row)), None)
    return {"license": max(names, key=row.index)} if row else {}
