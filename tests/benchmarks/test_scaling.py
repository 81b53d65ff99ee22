"""The table of more and more experts: shares of each expert's own score, the least one named, sizes and costs."""

from __future__ import annotations

from benchmarks.measure import EXPERTS, Row
from benchmarks.scaling import ROWS, document, drawn, grouped, shares
from benchmarks.zoo import RECIPES


def rows(pair: str, kept: list[float]) -> list[Row]:
    tasks = list(RECIPES[pair].seeds)
    own = dict(zip(tasks, [0.8] * len(tasks), strict=True))
    merged = {task: 0.8 * share for task, share in zip(tasks, kept, strict=True)}
    scores = {method: own if method == EXPERTS else merged for method in ROWS}
    return [Row(pair, m, None, "test", 512, scores[m], size=1.25, cpu_seconds=3.4) for m in ROWS]


def test_the_mean_and_the_least_share_are_told() -> None:
    own, *_, refitted = found = rows("many-2", [1.0, 0.5])
    assert shares(refitted, own) == [1.0, 0.5]
    page = document([*found, *rows("many-3-narrow", [0.5, 1.0, 0.9])], 512, None)
    wide, narrow = page.split("## Width 128")[1].split("## Width 64")
    assert "| 2 | permute + refit | .600 | 75.0 % | 50.0 % (letters) | 1.25 | 3 |" in wide
    assert "| 2 | experts | .800 | 100.0 % | - |" in wide
    assert "| 3 | permute + refit | .640 | 80.0 % | 50.0 % (tops) | 1.25 | 3 |" in narrow


def test_the_smallest_and_the_largest_group_are_told_in_a_sentence() -> None:
    page = document([*rows("many-2", [1.0, 0.5]), *rows("many-3", [0.5, 1.0, 0.9])], 512, None)
    assert (
        "From 2 to 3 experts the default's mean share goes from 75.0 to 80.0 %, the least from 50.0 to 50.0 %" in page
    )


def test_a_row_that_failed_is_told_and_not_shown_as_a_score() -> None:
    found = [*rows("many-2", [1.0, 0.5]), Row("many-4", EXPERTS, None, "test", 512, error="KeyError: 'x'")]
    assert list(grouped(found)[128]) == [2]
    assert "many-4 experts failed: KeyError: 'x'" in document(found, 512, None)


def test_the_picture_has_a_panel_for_each_width() -> None:
    figure = drawn([*rows("many-2", [1.0, 0.5]), *rows("many-2-narrow", [1.0, 0.5])])
    wide, narrow = figure.axes
    assert [axis.get_title(loc="left") for axis in (wide, narrow)] == ["width 128", "width 64"]
    assert [list(line.get_ydata()) for line in wide.lines] == [[0.75]] * 3
