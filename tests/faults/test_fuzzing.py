"""Odd recipes, configurations, cards and moments files are one sentence or right; `HF_ZIPIT_FUZZ` asks for more."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_zipit
from hf_zipit.errors import DataError, RecipeError, ZipItError
from hf_zipit.experts.loading import load_expert
from hf_zipit.observation.moments import Moments
from hf_zipit.recipe.loading import check_recipe
from hf_zipit.recipe.sections import Recipe
from hf_zipit.report.card import escaped
from hf_zipit.running.saved import load_merged
from hf_zipit.schema import read_yaml

from ..tiny import pair
from .killing import EVERYTHING

fuzz = settings(
    max_examples=2000 if EVERYTHING else 100, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300) | st.dates()
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(PLAIN, v, max_size=3), max_leaves=6)
KEYS = st.sampled_from([
    "name", "depth", "method", "refit", "output", "threads", "seed", "options", "corrections", "overrides", "combine",
    "calibration", "evaluation", "save", "push", "train", "base", "polish", "residual", "search",
])  # fmt: skip
SIZES = st.integers(-5, 300) | st.sampled_from([0, 0.5, 10**12, 10**400]) | st.none()
NAMES = st.sampled_from(["..", "../../victim", "/etc", "a\0b", "x" * 300, "a/b", "\n", "\ud800"]) | st.text(max_size=9)


@fuzz
@given(st.dictionaries(KEYS, VALUES, max_size=4), NAMES)
def test_an_odd_recipe_is_one_sentence(content: dict[str, Any], name: str) -> None:
    good = {"name": "x", "experts": {"a": {"model": "me/a"}, name: {"model": "me/b"}}, "method": "average"}
    try:
        check_recipe(Recipe.from_dict({**good, **content}))
    except ZipItError as error:
        assert str(error)


PIECES = [*"[]{}:,-?&*!|>%@`'\"#\n  ", "a", "name", "depth", "1", "9" * 5000, "2020-13-45", "<<", "!!int "]


@fuzz
@given(st.lists(st.sampled_from(PIECES)))
def test_an_odd_yaml_file_is_one_sentence(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    path.write_text("name: x\n" + "".join(parts))
    try:
        read_yaml(path)
    except RecipeError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    first, second = pair("vit")
    first.save_pretrained(root / "expert")
    merged = hf_zipit.merge({"a": first, "b": second}, method="identity", depth=0.5)
    merged.save_pretrained(root / "merged")
    return root


@pytest.mark.parametrize(("name", "load"), [("expert", partial(load_expert, "a")), ("merged", load_merged)])
@settings(fuzz, max_examples=2000 if EVERYTHING else 15)
@given(data=st.data())
def test_an_odd_configuration_is_one_sentence(
    models: Path, name: str, load: Callable[[str], Any], data: st.DataObject
) -> None:
    path = models / name / "config.json"
    whole = json.loads(path.read_text())
    odd = data.draw(st.dictionaries(st.sampled_from(sorted(whole)), SIZES | VALUES, min_size=1, max_size=2))
    try:
        path.write_text(json.dumps({**whole, **odd}, default=str, skipkeys=True))
        load(str(models / name))
    except ZipItError as error:
        assert "\n" not in str(error)
    finally:
        path.write_text(json.dumps(whole))


@fuzz
@given(st.text())
def test_an_error_is_one_line_whatever_it_quotes(text: str) -> None:
    assert str(ZipItError(f"The task '{text}' is unknown.")).isprintable()


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
