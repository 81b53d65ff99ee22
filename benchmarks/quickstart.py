"""The quickstart's table with its spread: the recipe with experts of several pairs of seeds.

`python -m benchmarks.quickstart` prints it as Markdown, for docs/quickstart.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from statistics import median

from hf_zipit.recipe.loading import load_recipe
from hf_zipit.recipe.sections import Recipe
from hf_zipit.running.run import run_recipe

SIDE_BY_SIDE = ("experts side by side", "-")


def seeded(recipe: Recipe, pair: int) -> Recipe:
    """The recipe whose experts start from initialisations of their own."""
    experts = {
        task: replace(entry, seed=2 * pair + place) for place, (task, entry) in enumerate(recipe.experts.items(), 1)
    }
    return replace(recipe, experts=experts)


def told(values: list[float]) -> str:
    """The median, and in brackets the lowest and the highest value."""
    low, middle, high = (f"{value:.3f}".removeprefix("0") for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    found = defaultdict(list)
    for pair in range(given.pairs):
        result = run_recipe(seeded(recipe, pair), save="nothing")
        measured = {SIDE_BY_SIDE: result.experts}
        measured |= {(row.method, f"{row.depth:.2f}"): row.accuracy for row in result.rows if row.depth}
        for key, accuracy in measured.items():
            found[key].append([*accuracy.per_task.values(), accuracy.mean, accuracy.joint])
    print(f"| method | depth | {' | '.join(recipe.experts)} | mean | joint |\n|---|---:|---:|---:|---:|---:|")
    for (method, depth), rows in found.items():
        print(f"| {method} | {depth} | {' | '.join(told(list(column)) for column in zip(*rows, strict=True))} |")


if __name__ == "__main__":
    main()
