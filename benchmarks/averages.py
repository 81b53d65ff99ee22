"""What every method keeps on average over the pairs: from the tables of the results page, into the same page.

    python -m benchmarks.averages docs/results.md

The default of `hf_zipit.merge` was chosen by this table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.kept_rows import EARLIER, tables
from hf_zipit.files import write_text
from hf_zipit.planning.auto import WITH_DATA, WITHOUT_DATA

HEADING = "## On average over the pairs"

OLD = f"""

Rows whose sources are *{EARLIER}* are from before the refit chose the bases of residual streams and the units of MLPs
and fitted them in steps ([what was tried](refit.md#what-was-tried)): with a refit most keep more now, and take longer.
Those without one come out the same where they were measured again, [with several seeds](spread.md)."""

REFERENCES = ("experts", "experts side by side")


def kept(page: str) -> dict[str, dict[str, float]]:
    """By method and pair the percentage of the experts' mean that is kept at depth 1."""
    found: dict[str, dict[str, float]] = {}
    for pair, rows in tables(page).items():
        for (method, depth), row in rows.items():
            if depth == "1" and (share := re.match(r"([\d.]+) %", row["of experts"])):
                found.setdefault(method, {})[pair] = float(share[1])
    return found


def sources(page: str, method: str) -> str:
    """Of which versions a method's rows at depth 1 are."""
    rows = (rows.get((method, "1")) for rows in tables(page).values())
    return ", ".join(dict.fromkeys(row["sources"] for row in rows if row))


def section(page: str) -> str:
    """The section with the means, the best first; methods that not every pair has are left out."""
    by_method = kept(page)
    pairs = {pair for shares in by_method.values() for pair in shares}
    whole = {m: shares for m, shares in by_method.items() if set(shares) == pairs and m not in REFERENCES}
    means = {method: sum(shares.values()) / len(shares) for method, shares in whole.items()}
    lines = ["| method | mean | least | sources |", "| --- | ---: | ---: | --- |"]
    for method in sorted(means, key=means.__getitem__, reverse=True):
        least = min(whole[method].values())
        lines.append(f"| {method} | {means[method]:.1f} % | {least:.1f} % | {sources(page, method)} |")
    return f"""{HEADING}

The share of the experts' mean that is kept at depth 1, over the {len(pairs)} pairs below (`python -m
benchmarks.averages`). `hf_zipit.merge(experts, calibration)` does what *{WITH_DATA} + refit* does: it is level with
the best and, unlike averaging, exact for experts that are near each other or reordered copies.
`hf_zipit.merge(experts)`, without data, does what *{WITHOUT_DATA}* does, the best of the methods that need none.

{chr(10).join(lines)}

All of this page is of one pair of seeds for each pair of models; [how much it varies](spread.md) was measured with
several.{OLD if EARLIER in {row["sources"] for rows in tables(page).values() for row in rows.values()} else ""}
"""


def updated(page: str) -> str:
    """The page with the section before the first pair's."""
    if HEADING in page:
        start = page.index(HEADING)
        page = page[:start] + page[page.index("\n## ", start + 1) + 1 :]
    first = page.index("\n## ") + 1
    return f"{page[:first]}{section(page)}\n{page[first:]}"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results.md")
    write_text(path, updated(path.read_text(encoding="utf-8")))
