"""Recipes: what is wrong is told before work starts, and what is right runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hf_zipit.errors import DataError, OutputError, RecipeError, ZipItError
from hf_zipit.evaluation.measure import accuracy
from hf_zipit.hub.cache import looks_local
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.recipe.sections import Data, Recipe
from hf_zipit.recipe.training import new_classifier
from hf_zipit.running import writing
from hf_zipit.running.data import merged_task_data
from hf_zipit.running.run import plan_recipe, run_recipe
from hf_zipit.running.saved import load_merged
from hf_zipit.schema import read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

TINY = {
    "name": "tiny",
    "threads": 1,
    "train": {
        "model": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "epochs": 1,
    },
    "experts": {"few": {"classes": [0, 1], "seed": 3}, "more": {"classes": ["4", "3", "2"], "seed": 4}},
    "calibration": {"dataset": "sklearn-digits", "samples": 24},
    "evaluation": {"dataset": "sklearn-digits", "split": "validation"},
    "method": ["average", "zip"],
    "depth": [1, 0],
    "save": {"method": "zip", "depth": 1},
}


def written(folder: Path, content: dict | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def tiny(folder: Path, **changes) -> Recipe:
    return load_recipe(written(folder, {**TINY, "output": str(folder / "out"), **changes}))


WRONG = {
    "unknown key": ({"metod": "zip"}, RecipeError, "did you mean 'method'"),
    "unknown inner key": (
        {"calibration": {"dataset": "sklearn-digits", "sample": 3}},
        RecipeError,
        "calibration.sample",
    ),
    "wrong type": ({"calibration": {"dataset": "sklearn-digits", "samples": "many"}}, RecipeError, "a whole number"),
    "a bool is no number": ({"seed": True}, RecipeError, "seed should be a whole number"),
    "a list for a section": ({"calibration": ["sklearn-digits"]}, RecipeError, "calibration should be a mapping"),
    "missing inner key": ({"evaluation": {"split": "test"}}, RecipeError, "evaluation.dataset is missing"),
    "no calibration": ({"calibration": None}, RecipeError, "calibration is missing"),
    "one expert": ({"experts": {"few": {"classes": [0, 1]}}}, RecipeError, "only 'few'; merging needs at least two"),
    "no expert": ({"experts": {}}, RecipeError, "none; merging needs at least two"),
    "empty task": (
        {"experts": {"": {"classes": [0]}, "b": {"classes": [1]}}},
        RecipeError,
        "task name '' .* is empty",
    ),
    "no model, no training": ({"train": None}, RecipeError, "few has no model and the recipe no train section"),
    "nothing to learn": ({"experts": {"a": {}, "b": {"classes": [1]}}}, RecipeError, "give the classes"),
    "missing folder": (
        {"experts": {"a": {"model": "./nowhere"}, "b": {"classes": [1]}}},
        RecipeError,
        "does not exist",
    ),
    "depth above one": ({"depth": 1.5}, RecipeError, "depth is 1.5; it must be a share from 0 to 1"),
    "depth below zero": ({"depth": [0, -0.1]}, RecipeError, "depth is -0.1; it must be a share"),
    "no depth": ({"depth": []}, RecipeError, "depth is an empty list"),
    "depth twice": ({"depth": [1, 1.0]}, RecipeError, "twice"),
    "unknown method": ({"method": "zap", "save": None}, RecipeError, "no method named 'zap'; did you mean 'zip'"),
    "option for no method": ({"options": {"permute": {}}}, RecipeError, "options.permute is for no method"),
    "unknown option": ({"options": {"zip": {"alfa": 0.3}}}, RecipeError, "did you mean 'alpha'"),
    "unknown refit setting": ({"refit": {"rigde": 1e-3}}, RecipeError, "refit.rigde .* did you mean 'ridge'"),
    "wrong refit setting": ({"refit": {"ridge": "much"}}, RecipeError, "refit.ridge should be a number"),
    "refit setting out of range": ({"refit": {"own_task_weight": 2}}, RecipeError, "at most 1"),
    "refit yes and no": ({"refit": False, "method": "zip+refit", "save": None}, RecipeError, "refit is false"),
    "refit without data": (
        {"refit": True, "method": "average", "calibration": None, "save": None},
        RecipeError,
        "calibration is missing",
    ),
    "unknown residual": ({"residual": "macht"}, RecipeError, "residual is .macht.; it must be .match."),
    "save what is not made": ({"save": {"method": "zip", "depth": 0.5}}, RecipeError, "does not make"),
    "unknown override": ({"overrides": {"*.mlp.*": "permut"}}, RecipeError, "did you mean 'permute'"),
    "unknown option of an override": (
        {"overrides": {"*.mlp.*": {"method": "zip", "alfa": 0.3}}},
        RecipeError,
        "did you mean 'alpha'",
    ),
    "override by a whole-network method": ({"overrides": {"*": "dual"}}, RecipeError, "aligns whole networks"),
    "override without a method": ({"overrides": {"*": {"alpha": 0.3}}}, RecipeError, "names no method"),
    "override that is no method": ({"overrides": {"*": 3}}, RecipeError, "must be a method's name or a mapping"),
    "option of a wrong type": ({"options": {"zip": {"alpha": "much"}}}, RecipeError, "must be a number"),
    "no samples": ({"calibration": {"dataset": "sklearn-digits", "samples": 0}}, RecipeError, "at least 1"),
    "unknown data": ({"evaluation": {"dataset": "sklearn-digit"}}, DataError, "did you mean 'sklearn-digits'"),
    "unknown metric": (
        {"evaluation": {"dataset": "sklearn-digits", "metrics": "f2"}},
        RecipeError,
        "There is no metric 'f2'",
    ),
    "missing data folder": ({"evaluation": {"dataset": "./nowhere"}}, DataError, "does not exist"),
    "a name that is a path": ({"name": "../up"}, RecipeError, "name should be"),
    "no place to push to": ({"push": {"private": True}}, RecipeError, "push.repo_id is missing"),
    "a place that is none": ({"push": {"repo_id": "a/b/c"}}, RecipeError, "push.repo_id should be user/name"),
    "negative seed": ({"seed": -1}, RecipeError, "seed is -1; it must be a whole number from 0 to 4294967295"),
    "misspelled method with a refit": (
        {"method": "zpi+refit"},
        RecipeError,
        "no method named 'zpi'; did you mean 'zip'",
    ),
    "no threads": ({"threads": 0}, RecipeError, "threads should be a number from 1"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_is_told_in_one_sentence(tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as told:
        tiny(tmp_path, **changes)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2.*'name' is given twice"),
        ("name: a\nexperts:\n  x: {model: m/a}\n  x: {model: m/b}\n", "line 4.*'x' is given twice"),
        ("name: [a\n", "no valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "empty"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        tiny(tmp_path, output=str(tmp_path / "file" / "out"))


def test_a_recipe_survives_being_written_and_read(tmp_path):
    recipe = tiny(tmp_path, options={"zip": {"alpha": 0.2}}, depth=[1, "vit.layers.1"])
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe


ODD = {
    "a list as key": ("? [a, b]\n: 1", "line 2 .*a key is a list or a mapping"),
    "a date as key": ("2020-01-01: 1", "2020-01-01 is not a known key"),
    "no date": ("depth: 2020-13-45", "line 2 .*'2020-13-45' is no timestamp"),
    "5,000 digits": (f"threads: {'9' * 5000}", "line 2 .* is no int"),
    "400 digits": (f"depth: {'9' * 400}", "depth.* should be a number or a text"),
    "too many threads": ("threads: 100000000", "threads should be a number from 1 to 1024, but is 100000000"),
    "nobody's home": ("output: ~nobody-is-here/x", "output should be a path"),
    "NUL in a path": ('output: "a\\0b"', "cannot be written"),
    "a name that leads up": ('push: {repo_id: "../x"}', "push.repo_id should be user/name"),
    "deep": ("depth: " + "[" * 1000, "nests too deeply"),
    "code": ("depth: !!python/object/apply:os.system [x]", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_is_one_sentence(tmp_path, case):
    text, message = ODD[case]
    experts = "experts: {a: {model: me/a}, b: {model: me/b}}\nmethod: average\n"
    with pytest.raises(ZipItError, match=message) as told:
        load_recipe(written(tmp_path, f"name: x\n{text}\n{experts}"))
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc", "a\0b", "x" * 300, " "])
def test_a_name_that_cannot_be_a_folders_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="name should be a word that can name a folder"):
        load_recipe(written(tmp_path, {**TINY, "name": name}))
    victims = {name: {"classes": [0, 1]}, "b": {"classes": [2, 3]}}
    with pytest.raises(RecipeError, match="The task name"):
        load_recipe(written(tmp_path, {**TINY, "experts": victims}))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_right_but_for_what_they_name(path, tmp_path, monkeypatch):
    """All of a recipe is checked, where the folders that it names are there (here empty ones)."""
    recipe = Recipe.from_dict(read_yaml(path))
    assert recipe.folder == Path("out") / recipe.name
    assert path.read_text().startswith("# ")
    folders = [(entry.model, "config.json") for entry in recipe.experts.values() if entry.model]
    folders += [(entry.data.dataset, "dataset_info.json") for entry in recipe.experts.values() if entry.data]
    monkeypatch.chdir(tmp_path)
    if local := [name for name, _ in folders if looks_local(name)]:
        with pytest.raises(ZipItError, match=f"{local[0]}.* does not exist"):
            load_recipe(path)
    for name, file in folders:
        if looks_local(name):
            Path(name).mkdir(parents=True, exist_ok=True)
            Path(name, file).write_text("{}")
    assert load_recipe(path) == recipe


def test_the_families_have_recipes():
    kinds = {path.stem for path in RECIPES}
    assert {"quickstart", "fashion-vit", "fashion-resnet", "wordnet-bert", "captions-clip", "hub-to-hub"} <= kinds
    assert Recipe.from_dict(read_yaml(RECIPES[0].parent / "hub-to-hub.yaml")).push is not None


def test_overrides_of_a_recipe_reach_its_merges(tmp_path):
    override = {"*.layers.1.mlp.fc1": {"method": "zip", "size": 24}}
    recipe = tiny(tmp_path, overrides=override, method=["weights", "partial"], depth=[1, 0.5], save=None)
    assert set(plan_recipe(recipe)) == {(m, d) for m in ("weights", "partial") for d in (1.0, 0.5)}
    result = run_recipe(recipe)
    kept = load_merged(str(result.model)).config
    assert kept.method["overrides"] == [override]
    assert kept.trunk_shapes["vit.layers.1.mlp.fc1.weight"] == [24, 16]


def test_a_plan_writes_nothing(tmp_path):
    recipe = tiny(tmp_path)
    plans = plan_recipe(recipe)
    assert list(plans) == [("average", 1.0), ("average", 0.0), ("zip", 1.0), ("zip", 0.0)]
    whole, apart = plans["zip", 1.0], plans["zip", 0.0]
    assert apart.parameters["merged"] == apart.parameters["experts"] > whole.parameters["merged"]
    assert (plans["average", 1.0].passes, whole.passes) == (0, 1)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run_recipe(tiny(folder))


def test_a_run_makes_every_method_at_every_depth(result):
    assert [(row.method, row.depth) for row in result.rows] == [
        ("average", 1.0),
        ("average", 0.0),
        ("zip", 1.0),
        ("zip", 0.0),
    ]
    assert set(result.experts.per_task) == {"few", "more"}


def test_depth_zero_is_the_experts_side_by_side(result):
    for row in result.rows:
        if row.depth == 0:
            assert row.accuracy == result.experts
            assert row.parameters == result.expert_parameters


def test_the_results_file_holds_what_was_returned(result):
    saved = json.loads((result.recipe.folder / "results.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert [row["accuracy"]["joint"] for row in saved["results"]] == [row.accuracy.joint for row in result.rows]


def test_the_kept_model_measures_as_its_row_says(result):
    assert (result.kept.method, result.kept.depth) == ("zip", 1.0)
    model = load_merged(str(result.model))
    data = merged_task_data(model, str(result.model), Data("sklearn-digits", "validation"))
    assert accuracy(model, data) == result.kept.accuracy
    # Labels follow the recipe's order of classes, not the data's.
    assert list(model.config.id2label.values()) == ["0", "1", "4", "3", "2"]


def test_a_run_leaves_a_picture_a_card_and_the_trained_experts(result):
    folder = result.recipe.folder
    assert sorted(p.name for p in folder.iterdir()) == ["accuracy.png", "experts", "model", "results.json"]
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "# tiny" in (result.model / "README.md").read_text()
    assert sorted(p.name for p in (folder / "experts").iterdir()) == ["few", "more"]


def test_the_same_recipe_gives_the_same_file(result, tmp_path):
    again = run_recipe(replace(result.recipe, output=tmp_path / "again", method=("zip",), depth=(1.0,)))
    assert (again.model / "model.safetensors").read_bytes() == (result.model / "model.safetensors").read_bytes()


def test_the_recipe_beside_the_model_is_the_one_that_ran(result):
    written = load_recipe(result.model / "recipe.yaml")
    assert {"hf-zipit", "torch", "transformers"} <= set(written.versions)
    assert all(len(entry.sha256) == 64 for entry in written.experts.values())
    experts = {task: replace(entry, sha256=None) for task, entry in written.experts.items()}
    assert replace(written, experts=experts, versions={}) == replace(result.recipe, output=None)


def test_foreign_files_stop_a_run_before_it_starts(tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a saved model"):
        tiny(tmp_path)


def test_a_run_pushes_the_kept_model_when_all_is_written(tmp_path, monkeypatch):
    pushed = []

    def push(folder, **settings):
        assert (folder / "model.safetensors").is_file() and (tmp_path / "out" / "results.json").is_file()
        pushed.append(settings)
        return SimpleNamespace(pr_url=None, repo_url="https://hub/me/digits")

    monkeypatch.setattr(writing, "push_saved", push)
    recipe = tiny(tmp_path, push={"repo_id": "me/digits", "private": True}, method="average", depth=1, save=None)
    assert recipe.push == load_recipe(written(tmp_path, recipe.to_yaml())).push
    plan_recipe(recipe)
    assert run_recipe(recipe, save="nothing").pushed is None and not pushed
    result = run_recipe(recipe)
    wanted = {"repo_id": "me/digits", "private": True, "revision": None, "create_pr": False, "commit_message": None}
    assert pushed == [wanted]
    assert result.pushed == "https://hub/me/digits"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["pushed"] == result.pushed
    # Whoever runs the recipe beside the model does not push into the maker's repo.
    assert load_recipe(result.model / "recipe.yaml").push is None


@pytest.mark.parametrize(("wrong", "message"), [("vitt", "did you mean 'vit'"), (None, "choose one of beit")])
def test_a_kind_of_model_that_there_is_not_is_told_shortly(wrong, message):
    with pytest.raises(RecipeError, match=message) as told:
        new_classifier({"model_type": wrong}, ["0", "1"], 0)
    assert len(str(told.value)) < 1000  # not the names of all models that transformers knows
