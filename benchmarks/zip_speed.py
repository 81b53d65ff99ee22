"""How long zip takes for one space, beside the straightforward algorithm.

    python benchmarks/zip_speed.py [--sizes 256 768 3072] [--slow-up-to 768] [--repeats 3]

The straightforward algorithm does what the published one does: search the whole matrix and copy it without one row and
column at every join. Both get the same correlations in the same run and one thread, and must find the same groups;
zip's time is the best of the repeats, the straightforward algorithm runs once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_zipit.align.methods.zip import zip_units


def correlation(units: int, experts: int = 2, seed: int = 0) -> Tensor:
    """Correlations `[T * d, T * d]` of experts that share half of their units' variance."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(units, 2 * units, generator=generator)
    own = torch.randn(experts, units, 2 * units, generator=generator)
    return torch.corrcoef((shared + own).flatten(0, 1).double())


def straightforward(similarity: Tensor, experts: int, alpha: float = 0.3, beta: float = 0.125) -> Tensor:
    """Labels `[T, d]`, with a search and a copy of the whole matrix at every join."""
    total = len(similarity)
    units = total // experts
    similarity = similarity.clone().fill_diagonal_(-torch.inf)
    origin = torch.arange(total) // units
    groups = [[unit] for unit in range(total)]
    budget = [int((total - units) / experts * beta + 1e-4)] * experts
    while len(groups) > units:
        p, q = sorted(divmod(int(similarity.argmax()), len(similarity)))
        row = torch.minimum(similarity[p], similarity[q]) * alpha
        row[p] = -torch.inf
        similarity[p], similarity[:, p] = row, row
        keep = torch.arange(len(similarity)) != q
        similarity = similarity[keep][:, keep]
        inside = int(origin[p]) if origin[p] == origin[q] else None
        origin = origin[keep]
        groups[p] += groups.pop(q)
        if inside is not None:
            budget[inside] -= 1
            if budget[inside] <= 0:
                own = origin == inside
                similarity[own[:, None] & own[None, :]] = -torch.inf
    labels = torch.empty(total, dtype=torch.int64)
    for label, group in enumerate(groups):
        labels[group] = label
    return labels.reshape(experts, units)


def timed(function: Callable[..., Any], *arguments: Any, repeats: int = 1, **options: Any) -> tuple[float, Any]:
    """The shortest of the repeats in seconds, and the result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*arguments, **options)
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 768, 3072], help="units per expert")
    parser.add_argument("--slow-up-to", type=int, default=768, help="largest size for the straightforward algorithm")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    table = Table("units d", "zip [s]", "straightforward [s]", "ratio", title="zip of one space, 2 experts, to k = d")
    for units in arguments.sizes:
        similarity = correlation(units)
        fast, found = timed(zip_units, similarity, 2, repeats=arguments.repeats)
        row = [str(units), f"{fast:.3f}", "-", "-"]
        if units <= arguments.slow_up_to:
            # `compat` counts joined groups as the straightforward algorithm does.
            found = zip_units(similarity, 2, compat=True)
            slow, expected = timed(straightforward, similarity, 2)
            if not torch.equal(found.labels, expected):
                raise SystemExit(f"The two algorithms found different groups at d = {units}.")
            row[2:] = [f"{slow:.3f}", f"{slow / fast:.0f}"]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
