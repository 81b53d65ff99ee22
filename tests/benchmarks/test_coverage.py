"""Classes that no table of tiny models names: built small, proven, merged with a reordered copy, told in a table."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks.coverage import SAME, SOLVED, Row, classes, measure, page, read
from tests import tiny

FREE = [
    "Qwen3MoeForCausalLM",
    "T5ForConditionalGeneration",
    "PvtForImageClassification",  # its configuration names no classes
    "Qwen2_5_VisionTransformerPretrainedModel",  # of images that are cut by grids
    "ReformerForSequenceClassification",  # runs its layers forwards and backwards at once
    "ViTMAEModel",  # draws what it sees
]


def measured(name: str) -> Row:
    return list(measure(Row(name, "family", "mapping", tree="now"), refitting=name == FREE[0]))[-1]


@pytest.mark.parametrize("name", tiny.mostly_seldom(FREE, 2))
def test_a_class_proves_and_a_reordered_copy_comes_back(name):
    row = measured(name)
    assert row.stage == "done"
    assert row.proven
    assert row.mlp == 1
    assert max(row.weights, row.permute) <= SAME
    assert row.loaded
    if name == FREE[0]:
        assert row.solved > SOLVED and row.refit_tree == "now"
        assert all("norm" in name for name in row.kept)


def test_of_every_family_one_class_comes_first():
    found = classes()
    families = [family for _, family, _ in found]
    first = len(set(families))
    assert len(set(families[:first])) == first
    assert len({name for name, _, _ in found}) == len(found)


def test_rows_are_read_again_and_the_last_one_of_a_class_counts(tmp_path):
    rows = [Row("A", "a", "base", error="no | way"), Row("A", "a", "base", stage="done", proof=1e-7, attention=1.0)]
    rows[1].solved, rows[1].kept, rows[1].refit_tree = 0.5, ["scale"], "then"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(asdict(row)) + "\n" for row in [*rows, Row("B", "b", "base", error="no | way")])
    )
    found = read(path)
    assert found == [rows[1], Row("B", "b", "base", error="no | way")]
    text = page(found, "make coverage")
    assert "| classes tried | 2 |" in text
    assert "| traced and proven at 1e-5 | 1 |" in text
    assert "| of which it solves less | 1 |" in text
    assert "| A | 50.0 % | scale |" in text
    assert "| B | no / way |" in text
