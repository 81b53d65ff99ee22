"""The section about averages is taken from the page's own tables."""

from __future__ import annotations

from pathlib import Path

from benchmarks.averages import HEADING, kept, section, updated

PAGE = """# Results

Intro.

## one

| method | depth | a | mean | of experts |
| --- | ---: | ---: | ---: | ---: |
| experts | - | .9 | .9 | 100.0 % |
| zip | 1 | .5 | .5 | 50.0 % |
| zip | 0.5 | .6 | .6 | 60.0 % |
| average | 1 | .2 | .2 | 20.0 % |

## two

| method | depth | a | b | mean | of experts |
| --- | ---: | ---: | ---: | ---: | ---: |
| zip | 1 | .7 | .7 | .7 | 70.0 % |
| special | 1 | .9 | .9 | .9 | 90.0 % |
| average | 1 | .4 | .4 | .4 | 40.0 % |
"""


def test_means_are_over_pairs_that_all_have_the_method_at_depth_1() -> None:
    assert kept(PAGE)["zip"] == {"one": 50.0, "two": 70.0}
    lines = [line for line in section(PAGE).splitlines() if line.startswith("| ")]
    assert lines[2:] == ["| zip | 60.0 % | 50.0 % | earlier |", "| average | 30.0 % | 20.0 % | earlier |"]


def test_the_section_is_put_before_the_pairs_and_only_once() -> None:
    once = updated(PAGE)
    assert once.index("Intro.") < once.index(HEADING) < once.index("## one")
    assert updated(once) == once


def test_the_page_in_the_docs_is_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    assert updated(page) == page
