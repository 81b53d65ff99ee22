"""The results table: what is computed from the rows, how it is written, and that a row is measured apart."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import measure, results
from benchmarks.kept_rows import EARLIER, tables
from benchmarks.measure import ENSEMBLE, EXPERTS, METHODS, REFERENCES, Row
from benchmarks.refit_scaling import line
from benchmarks.zoo import Metric, Pair

PAIR = "wordnet-bert"
METHODS_AND_SCORES = (("average + refit", 0.6), ("permute + refit", 0.7), ("average", 0.1))
ROOT = Path(__file__).parents[2]


def _row(method: str = "zip", depth: float | None = 1.0, a: float = 0.5, b: float = 0.7, **more: object) -> Row:
    given = {
        "samples": 512,
        "scores": {"a": a, "b": b},
        "size": 1.0,
        "seconds": 2.0,
        "cpu_seconds": 3.0,
        "machine": "BOX",
    } | more
    return Row(PAIR, method, depth, "test", **given)


def _reference(method: str = EXPERTS, **more: object) -> Row:
    return _row(method, None, 0.8, 0.8, samples=None, seconds=None, cpu_seconds=None, **more)


def _parsed(markdown: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by their heads."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    heads, rule, *rows = lines
    assert all(re.fullmatch("-+:?", cell) for cell in rule)
    assert all(len(row) == len(heads) for row in [rule, *rows])
    return [dict(zip(heads, row, strict=True)) for row in rows]


@pytest.fixture
def tiny_pair() -> Pair:
    """Two untrained BERTs with three and two classes on random tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 3, "b": 2}
    experts, splits = {}, {}
    for seed, (task, classes) in enumerate(sizes.items()):
        torch.manual_seed(seed)
        small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        labels = {"id2label": {i: f"{task}{i}" for i in range(classes)}}
        config = BertConfig(vocab_size=20, max_position_embeddings=8, **small, **labels)
        experts[task] = BertForSequenceClassification(config).eval()
        ids = torch.randint(5, 20, (12, 6), generator=generator)
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(12) % classes}
        splits[task] = dict.fromkeys(("train", "validation", "test"), data)
    names = {task: tuple(f"{task}{i}" for i in range(classes)) for task, classes in sizes.items()}
    return Pair(PAIR, experts, splits, Metric("accuracy", classes=names))


# The table -----------------------------------------------------------------------------------------------------------


def test_shares_are_of_the_experts_mean() -> None:
    expert, zipped = _parsed(results.table([_reference(), _row(a=0.5, b=0.7)]))
    assert (expert["mean"], expert["of experts"], expert["seconds"]) == (".800", "100.0 %", "-")
    assert (zipped["a"], zipped["b"], zipped["mean"], zipped["of experts"]) == (".500", ".700", ".600", "75.0 %")
    assert (zipped["seconds"], zipped["CPU s"], zipped["memory"], zipped["joint"]) == ("2.0", "3.0", "-", "-")


def test_a_table_without_experts_has_no_shares() -> None:
    assert [row["of experts"] for row in _parsed(results.table([_row()]))] == ["-"]


def test_a_failed_row_keeps_its_place_and_its_reason() -> None:
    broken = Row(PAIR, "permute", 0.5, "test", 512, error="SpecError: no such block")
    text = results.section(PAIR, [_reference(), broken, _row()])
    rows = _parsed("\n".join(line for line in text.splitlines() if line.startswith("|")))
    assert [row["method"] for row in rows] == [EXPERTS, "permute", "zip"]
    assert set(rows[1].values()) == {"permute", "0.5", "-"}
    assert "permute at depth 0.5 failed: SpecError: no such block" in text


def test_the_page_has_a_section_a_pair_and_says_what_was_run() -> None:
    rows = [_reference(), _row(), dataclasses.replace(_row("weights", samples=None), pair="fashion-vit")]
    page = results.document(rows, results.introduction(rows, "COMMAND"))
    assert re.findall("^## (.*)$", page, re.M) == ["fashion-vit", PAIR]  # in the order of the zoo
    assert "`COMMAND`" in page and page.count("BOX") == 1 and "512 unlabelled samples" in page and "test split" in page
    assert '| `method="zip"` |' in page and "| permute |" not in page
    assert (
        max(len(line) for line in page.split("## ")[0].splitlines() if not line.startswith(("|", "Mach", "Writ")))
        < 120
    )


def test_the_legend_shows_arguments_that_evaluate_to_the_settings() -> None:
    for name, method in METHODS.items():
        typed = re.findall(r"`([^`]*)` \|$", results.legend([name]), re.MULTILINE)[-1]  # the first is the header
        assert eval(f"dict({typed})") == dict(method.settings)


# Rows that are kept --------------------------------------------------------------------------------------------------


def test_rows_of_a_page_keep_their_text_where_others_are_measured(tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.md", tmp_path / "rows.json"
    other = dataclasses.replace(_row(a=0.123), pair="fashion-vit", sources="0ld0ld0l")
    first = [_reference(sources="0ld0ld0l"), _row(sources="0ld0ld0l"), _row(depth=0.5, sources="0ld0ld0l"), other]
    without = results.document(first, results.introduction(first, "COMMAND"))
    without = re.sub(r" (sources|0ld0ld0l|---:|-) \|$", "", without, flags=re.MULTILINE)  # as before that column
    page.write_text(without + "\n## On an accelerator\n\nBy hand.\n")
    new = [_reference(), _row(a=0.9, b=0.9), _row("weights", samples=None)]
    new = [dataclasses.replace(row, sources="ne3ne3ne") for row in new]
    numbers.write_text(json.dumps({"rows": [dataclasses.asdict(row) for row in new]}))

    told = []
    for _ in range(2):
        results.main(zoo=tmp_path, out=page, reuse=[numbers], only_reused=True, keep=True)
        told.append(page.read_text())
    assert told[0] == told[1]
    found = tables(told[0])
    assert list(found[PAIR]) == [(EXPERTS, "-"), ("zip", "1"), ("zip", "0.5"), ("weights", "1")]
    assert [row["sources"] for row in found[PAIR].values()] == ["ne3ne3ne", "ne3ne3ne", EARLIER, "ne3ne3ne"]
    assert found[PAIR]["zip", "1"]["of experts"] == "112.5 %"
    kept = tables(without)["fashion-vit"]
    assert found["fashion-vit"] == kept and kept["zip", "1"]["a"] == ".123"
    assert "sources `0ld0ld0l`, `ne3ne3ne`" in told[0] and told[0].count(f"*{EARLIER}* stands for") == 1
    assert told[0].endswith("## On an accelerator\n\nBy hand.\n")


def test_rows_are_kept_of_a_page_of_the_same_scores_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match="name one that is there with --out"):
        results.kept_page(page, results.Split.test, 512)
    page.write_text(results.introduction([_reference(), _row()], "COMMAND"))
    assert results.kept_page(page, results.Split.test, 512)
    for asked in ((results.Split.validation, 512), (results.Split.test, 64)):
        with pytest.raises(SystemExit, match="leave out --keep"):
            results.kept_page(page, *asked)


# Which rows ----------------------------------------------------------------------------------------------------------


def test_the_references_come_once_and_every_method_at_every_depth() -> None:
    asked = list(results.requests(["p", "q"], ["zip", "refit"], [1.0, 0.5]))
    assert len(asked) == 2 * (len(REFERENCES) + 4) and len({tuple(each.items()) for each in asked}) == len(asked)
    assert [each["method"] for each in asked[: len(REFERENCES)]] == list(REFERENCES)
    assert all((each["depth"] is None) == (each["method"] in REFERENCES) for each in asked)


def test_rows_are_taken_over_from_a_file_only_where_they_answer_what_is_asked(tmp_path: Path) -> None:
    rows = [_row(), _row(a=0.9), _row("weights", samples=None), Row(PAIR, "permute", 1.0, "test", 512, error="x")]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
    known = results.known_rows([file])
    assert known == rows[:3]
    asked = {"pair": PAIR, "method": "zip", "depth": 1.0, "split": "test", "samples": 512}
    assert results.reused(known, asked) == rows[1]  # the later one
    assert results.reused(known, {**asked, "method": "weights", "samples": 64}) == rows[2]  # looks at no data
    for name, other in {"pair": "x", "method": "permute", "depth": 0.5, "split": "validation", "samples": 64}.items():
        assert results.reused(known, {**asked, name: other}) is None


def test_a_row_of_the_same_settings_is_not_measured_twice() -> None:
    asked = {"pair": "fashion-vit", "method": "chosen + refit", "depth": 1.0, "split": "test", "samples": 512}
    known = [dataclasses.replace(_row(method, a=a), pair="fashion-vit") for method, a in METHODS_AND_SCORES]
    assert results.reused(known, asked) == dataclasses.replace(known[0], method="chosen + refit")
    assert results.reused(known, {**asked, "pair": PAIR}) is None
    other = [dataclasses.replace(row, pair=PAIR) for row in known]  # whose chosen alignment is no average
    assert results.reused(other, {**asked, "pair": PAIR}) is None
    own = dataclasses.replace(known[0], method="chosen + refit", scores={"a": 0.3})
    assert results.reused([own, *known], asked) == own


def test_the_command_can_be_typed_again() -> None:
    typed = results.command_line(pairs=[PAIR], methods=["chosen + refit + joint heads"], depths=[], split="validation")
    assert typed.endswith(f'--pairs {PAIR} --methods "chosen + refit + joint heads" --split validation')


@pytest.mark.parametrize(("kind", "names"), [("pair", ["wordnet"]), ("method", ["zip", "zap"])])
def test_unknown_names_are_told(kind: str, names: list[str]) -> None:
    with pytest.raises(SystemExit, match=f"no {kind} '{names[-1]}'; choose from: zip"):
        results.checked(kind, names, ["zip"])


# Measuring -----------------------------------------------------------------------------------------------------------


def test_the_ensemble_is_the_merge_at_depth_zero(tiny_pair: Pair) -> None:
    inputs = {name: tensor for name, tensor in tiny_pair.splits["a"]["test"].items() if name != "labels"}
    merged = measure.merge(tiny_pair.experts, method="identity", depth=0.0)
    with torch.no_grad():
        expected = merged(**inputs).logits
    torch.testing.assert_close(measure.ensemble(tiny_pair, **inputs).logits, expected)


@pytest.mark.parametrize("method", [EXPERTS, ENSEMBLE, "average", "permute"])
def test_a_row_is_what_scoring_by_hand_gives(tiny_pair: Pair, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "load", lambda *args, **options: tiny_pair)
    depth = None if method in REFERENCES else 1.0
    row = measure.measure("zoo", PAIR, method, depth, "test", 8)
    if depth is None:
        models = tiny_pair.experts
        joint = tiny_pair.joint_score(partial(measure.ensemble, tiny_pair)) if method == ENSEMBLE else None
        assert (row.seconds, row.samples, row.joint) == (None, None, joint)
    else:
        settings = METHODS[method]
        calibration = {task: tiny_pair.calibration(task, 8) for task in tiny_pair.experts} if settings.data else None
        merged = measure.merge(tiny_pair.experts, calibration, **settings.settings)
        models = {task: partial(merged, task=task) for task in tiny_pair.experts}
        assert row.joint == tiny_pair.joint_score(merged)
        assert row.seconds > 0 and (row.samples == 8) == settings.data
    assert row.scores == {task: tiny_pair.score(model, task) for task, model in models.items()}
    assert row.size == pytest.approx(2.0 if method == ENSEMBLE else 1.0, abs=0.1)


def test_what_goes_wrong_in_a_row_is_in_the_row(tmp_path: Path) -> None:
    row = measure.measure_apart(zoo=str(tmp_path), pair=PAIR, method="zip", depth=1.0, split="test", samples=8)
    assert row.error.startswith("FileNotFoundError") and not row.scores and row.mean is None


PEAK = """
from benchmarks.memory import resident, restart_peak
bytearray(128 * 2**20)  # gone again
before = restart_peak()
first = resident("VmHWM") - before
held = bytearray(64 * 2**20)
print(first, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this system does not tell the peak")
def test_the_peak_counts_only_what_came_after_its_restart() -> None:
    # In a process of its own that is too small to shrink by much meanwhile, as this one may.
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert first < 32 < second < 96


def test_a_line_is_found_again() -> None:
    slope, fixed, off = line([1, 2, 4], [5.0, 7.0, 11.0])
    assert (slope, fixed, off) == pytest.approx((2.0, 3.0, 0.0), abs=1e-9)
    assert line([1, 2, 4], [1.0, 4.0, 16.0])[2] > 0.1
