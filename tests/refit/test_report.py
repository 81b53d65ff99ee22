"""What the refit left is saved with the model, drawn, and told by card, results and command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from hf_zipit import merge
from hf_zipit.errors import RecipeError
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.recipe.sections import Recipe, is_refitted
from hf_zipit.refit import RefitConfig, RefitReport
from hf_zipit.report.card import REFIT_PICTURE, Result, card_text
from hf_zipit.report.plots import refit_picture, save_picture, short_names
from hf_zipit.running.run import run_recipe

from ..cli.conftest import call, vits  # noqa: F401  # fixtures
from ..recipe.test_recipe import TINY, tiny, written
from ..test_invariants import calibration, experts

REPORT = RefitReport(
    ("a", "b"), {"vit.one": {"a": 0.1, "b": 0.3}, "vit.two": {"a": 0.5}, "vit.a.x": {}}, ("vit.token",)
)


def test_numbers_of_a_report():
    assert REPORT.worst(2) == [("vit.two", 0.5), ("vit.one", 0.2)]
    assert REPORT.mean == pytest.approx(0.3)
    again = RefitReport.from_dict(json.loads(json.dumps(REPORT.to_dict())))
    assert again == REPORT and list(again.errors) == list(REPORT.errors)


def test_names_lose_what_all_begin_with():
    assert short_names(["vit.a.b", "vit.a.c.d"]) == ["b", "c.d"]
    assert short_names(["vit.a", "bert.a"]) == ["vit.a", "bert.a"]
    assert short_names(["layer"]) == ["layer"]
    assert short_names(["vit", "vit.a"]) == ["vit", "vit.a"]


@pytest.mark.parametrize("blocks", [0, 1, 12, 24])
def test_the_picture_of_a_long_model_takes_columns(tmp_path: Path, blocks: int):
    names = [f"bert.layer.{i}.module.{j}" for i in range(blocks) for j in range(8)]
    report = RefitReport(("a", "b"), {name: {"a": 0.1, "b": 0.2} for name in names})
    height, width = imread(save_picture(refit_picture(report, "title"), tmp_path / "errors.png")).shape[:2]
    assert height < 1400
    assert width > 900 * (blocks > 6)


def test_it_is_saved_with_the_model_and_told_by_its_card(tmp_path: Path):
    models = dict(zip(("low", "high"), experts("vit"), strict=True))
    data = calibration(models["low"])
    merged = merge(models, {"low": data, "high": data}, method="identity", refit=True)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    report = RefitReport.of(loaded)
    assert report.tasks == ("low", "high") and len(report.errors) > 10
    assert report == RefitReport.of(merged) and list(report.errors) == list(RefitReport.of(merged).errors)
    assert report.untouched == ()

    text = (tmp_path / "README.md").read_text()
    module, error = report.worst(1)[0]
    assert f"| `{module}` | {error:.3f} |" in text and f"({REFIT_PICTURE})" in text
    assert (tmp_path / REFIT_PICTURE).is_file()

    plain = merge(models, method="identity")
    assert RefitReport.of(plain) is None
    assert REFIT_PICTURE not in card_text(plain, Result.of(plain, "both"))


REFITS = {
    "none": ({}, {"average": None, "zip": None}),
    "all": ({"refit": True}, {"average": RefitConfig(), "zip": RefitConfig()}),
    "settings": ({"refit": {"ridge": "1e-3"}}, {"average": RefitConfig(ridge=1e-3), "zip": RefitConfig(ridge=1e-3)}),
    "off": ({"refit": False}, {"average": None, "zip": None}),
    "one": ({"method": ["zip", "zip+refit"]}, {"zip": None, "zip+refit": RefitConfig()}),
    "settings of one": (
        {"method": ["zip", "zip+refit"], "refit": {"micro_batch": 3}},
        {"zip": None, "zip+refit": RefitConfig(micro_batch=3)},
    ),
}


@pytest.mark.parametrize(("changes", "expected"), REFITS.values(), ids=REFITS.keys())
def test_which_methods_of_a_recipe_are_refitted(tmp_path: Path, changes: dict, expected: dict):
    recipe = tiny(tmp_path, **changes)
    assert {method: recipe.config(method, 1.0).refit for method in recipe.method} == expected
    assert [is_refitted(recipe, method) for method in recipe.method] == [bool(e) for e in expected.values()]
    (tmp_path / "again").mkdir()
    again: Recipe = load_recipe(written(tmp_path / "again", recipe.to_yaml()))
    assert again == recipe


def test_a_recipe_with_a_refit_runs(tmp_path: Path):
    recipe = tiny(tmp_path, method=["average", "average+refit"], save={"method": "average+refit", "depth": 1})
    result = run_recipe(recipe)
    saved = json.loads((recipe.folder / "results.json").read_text())
    assert saved["refit_errors"] == result.refit.to_dict() and saved["refit_errors"]
    assert (recipe.folder / "model" / REFIT_PICTURE).is_file()
    assert "## What the refit left" in (recipe.folder / "model" / "README.md").read_text()


def test_a_recipe_that_keeps_no_refit_tells_of_none(tmp_path: Path):
    recipe = tiny(tmp_path, method="average", depth=1, save=None, evaluation=None)
    assert run_recipe(recipe).refit is None
    assert not (recipe.folder / "model" / REFIT_PICTURE).exists()


def test_the_command_line_refits(call, vits, tmp_path: Path):  # noqa: F811
    arguments = [
        vits / "low",
        vits / "high",
        "--calibration",
        "sklearn-digits",
        "--samples",
        16,
        "-m",
        "identity",
        "-q",
    ]
    code, out, err = call("merge", *arguments, "--out", tmp_path / "refitted", "--refit")
    assert code == 0, err
    assert "identity+refit" in out and "refit    relative error" in out
    assert json.loads((tmp_path / "refitted" / "config.json").read_text())["method"]["refit"]
    code, out, err = call("merge", *arguments, "--out", tmp_path / "plain", "--no-refit")
    assert code == 0, err
    assert "relative error" not in out and "+refit" not in out
    assert not json.loads((tmp_path / "plain" / "config.json").read_text())["method"]["refit"]


def test_a_sweep_over_other_methods_leaves_the_refit_out(call, tmp_path: Path):  # noqa: F811
    recipe = written(
        tmp_path, {**TINY, "method": ["average+refit"], "refit": {"ridge": 0.01}, "save": None, "depth": 1}
    )
    code, out, err = call("sweep", recipe, "--method", "average", "--json", "-q")
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["results"]] == ["average"]
    assert "refit" not in json.loads(out)["recipe"]


def test_a_refit_that_is_both_wanted_and_not_is_told(tmp_path: Path):
    with pytest.raises(RecipeError, match="refit is false, but method asks for it"):
        tiny(tmp_path, method="zip+refit", refit=False, save=None)
