"""Odd recipes, cards and moments files are one sentence or right; `HF_ZIPIT_FUZZ` asks for many more of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_zipit.errors import DataError, ZipItError
from hf_zipit.observation.moments import Moments
from hf_zipit.recipe.loading import check_recipe
from hf_zipit.recipe.sections import Recipe
from hf_zipit.report.card import escaped

from .killing import EVERYTHING

fuzz = settings(
    max_examples=2000 if EVERYTHING else 100, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300) | st.dates()
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(PLAIN, v, max_size=3), max_leaves=6)
KEYS = st.sampled_from(
    [
        "name",
        "depth",
        "method",
        "refit",
        "output",
        "threads",
        "seed",
        "options",
        "corrections",
        "overrides",
        "combine",
        "calibration",
        "evaluation",
        "save",
        "push",
        "train",
        "base",
    ]
)
NAMES = st.sampled_from(["..", "../../victim", "/etc", "a\0b", "x" * 300, "a/b", "\n", "\ud800"]) | st.text(max_size=9)


@fuzz
@given(st.dictionaries(KEYS, VALUES, max_size=4), NAMES)
def test_an_odd_recipe_is_one_sentence(content: dict[str, Any], name: str) -> None:
    good = {"name": "x", "experts": {"a": {"model": "me/a"}, name: {"model": "me/b"}}, "method": "average"}
    try:
        check_recipe(Recipe.from_dict({**good, **content}))
    except ZipItError as error:
        assert str(error)


@fuzz
@given(st.text())
def test_a_name_stays_in_its_cell(text: str) -> None:
    line = escaped(text)
    assert len(line.splitlines()) <= 1
    assert "<" not in line and ">" not in line
    bare = line.replace("\\\\", "")
    assert all(bare.count(mark) == bare.count(f"\\{mark}") for mark in "|`[]")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moments = Moments(("a", "b"), fingerprint={"experts": {"a": "1", "b": "2"}})
    moments.add(("space",), [torch.randn(5, 3), torch.randn(5, 3)])
    return moments.save(tmp_path_factory.mktemp("moments") / "whole.safetensors")


@fuzz
@given(st.data())
def test_a_changed_moments_file_is_refused(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    changed = whole.with_name("changed.safetensors")
    changed.write_bytes(content)
    with pytest.raises(DataError):
        Moments.load(changed)
