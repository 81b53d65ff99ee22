"""The recipe's key `corrections`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_zipit.errors import RecipeError
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.running.run import run_recipe
from hf_zipit.running.saved import load_merged

from ..recipe.test_recipe import tiny

BY_NAME = ["repair", "rescale-shift"]
WITH_OPTIONS = {"repair": {}, "rescale-shift": {"samples": 16}}


@pytest.mark.parametrize(
    ("corrections", "written"),
    [
        ("repair", "repair"),
        (BY_NAME, BY_NAME),
        (WITH_OPTIONS, [{name: options} for name, options in WITH_OPTIONS.items()]),  # files sort the keys of mappings
    ],
)
def test_a_recipe_is_written_as_it_is_read(corrections: object, written: object, tmp_path: Path):
    recipe = tiny(tmp_path, corrections=corrections)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again.configs == recipe.configs
    assert again.to_dict() == recipe.to_dict()
    assert yaml.safe_load(recipe.to_yaml())["corrections"] == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrections": ["repare"]}, "did you mean 'repair'"),
        ({"corrections": BY_NAME[::-1]}, "last"),
        ({"corrections": {"repair": {"sample": 1}}}, "did you mean 'samples'"),
        ({"corrections": BY_NAME, "calibration": None, "method": "average", "save": None}, "calibration is missing"),
    ],
)
def test_wrong_corrections_are_told(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=message):
        tiny(tmp_path, **changes)


def test_a_recipe_runs_its_corrections(tmp_path: Path):
    changes = {"corrections": WITH_OPTIONS, "method": "average", "depth": 1, "save": None, "evaluation": None}
    recipe = tiny(tmp_path, **changes)
    run_recipe(recipe)
    merged = load_merged(recipe.folder / "model")
    assert [name for one in merged.config.method["corrections"] for name in one] == BY_NAME
    assert merged.config.rescaled
    assert any(name.startswith("rescales.trunk.") for name in merged.state_dict())
