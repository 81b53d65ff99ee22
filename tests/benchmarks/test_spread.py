"""What is printed of several pairs of seeds, and of how well a score is known."""

from __future__ import annotations

from benchmarks.measure import EXPERTS, Row
from benchmarks.sampling import half_width
from benchmarks.spread import METHODS, document, told


def rows(shift: int, kept: float) -> dict[str, Row]:
    scores = {name: {"a": 0.8 * (1 if name == EXPERTS else kept)} for name in METHODS}
    return {name: Row("fashion-vit", name, None, "test", 512, scores[name], cpu_seconds=2.0) for name in METHODS}


def test_several_seeds_are_told_by_median_lowest_and_highest() -> None:
    assert told(["9.5 %", "10.0 %", "8.0 %"]) == "9.5 % (8.0 to 10.0)"
    assert told([".852"]) == ".852" and told([".85", ".89"]) == ".87 (.85 to .89)"
    page = document(
        {"fashion-vit": {shift: rows(shift, kept) for shift, kept in ((0, 0.5), (1000, 0.9), (2000, 0.75))}}
    )
    assert "| 3 | .800 (.800 to .800) | 75.0 % (50.0 to 90.0) |" in page
    assert "fashion-vit 1/2, 1001/1002, 2001/2002" in page and "| 1001/1002 | average | .720 | 90.0 % | 2.0 |" in page


def test_a_mean_of_tasks_is_known_better_than_each() -> None:
    assert round(half_width([0.5], [100]), 3) == 0.098
    assert round(half_width([0.5, 0.5], [100, 100]), 4) == round(0.098 / 2**0.5, 4)
