"""A merged model remembers how it was made: its recipe runs again, and its card can be made again from it alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import ViTConfig, ViTForImageClassification

import hf_zipit
from hf_zipit.config import RefitConfig
from hf_zipit.evaluation.results import Accuracies
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.recipe.sections import CalibrationData, ExpertEntry, Measured, Recipe
from hf_zipit.report.card import DEPTH_PICTURE, REFIT_PICTURE, Result
from hf_zipit.report.recorded import recorded_recipe
from hf_zipit.running.run import cpu_threads, run_recipe
from hf_zipit.running.saved import load_merged
from hf_zipit.running.verify import _calibration as calibration_check
from hf_zipit.running.verify import verify
from tests import tiny
from tests.cli.conftest import call  # noqa: F401  # a fixture
from tests.hub.card_rules import problems
from tests.modeling.by_hand import make_inputs

DIGITS = {"low": "01", "high": "789"}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    for seed, (task, digits) in enumerate(DIGITS.items()):
        labels = dict(enumerate(digits))
        config = ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, id2label=labels, label2id={label: i for i, label in labels.items()},
        )  # fmt: skip
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(folder / task)
    return {task: folder / task for task in DIGITS}


def test_the_card_says_what_was_read_and_verify_reads_it_again(run):
    model = load_merged(str(run.model))
    read = model.config.method["calibration_data"]
    assert read["samples"] == {"low": 32, "high": 32}
    card = (run.model / "README.md").read_text()
    assert f"64 unlabelled samples from sklearn-digits, sha256 `{read['sha256']}`" in card
    assert hashlib.sha256((run.model / "recipe.yaml").read_bytes()).hexdigest() in card
    (same,) = [check for check in verify(str(run.model), calibration=True) if check.what == "calibration data"]
    assert same.good and read["sha256"][:12] in same.found
    model.config.method["recipe"]["seed"] = 5  # draws other samples
    assert not calibration_check(model, print).good


@pytest.fixture(scope="module")
def run(experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """A recipe of two methods and depths, measured, with a refitted model that is kept."""
    recipe = Recipe(
        name="digits",
        experts={task: ExpertEntry(model=str(folder)) for task, folder in experts.items()},
        calibration=CalibrationData(dataset="sklearn-digits", samples=32),
        evaluation=Measured(dataset="sklearn-digits", samples=32, metrics=("f1", "perplexity")),
        method=("permute+refit", "permute"),
        depth=(1.0, 0.0),
        threads=1,
        output=tmp_path_factory.mktemp("run") / "out",
    )
    return run_recipe(recipe)


def test_the_recipe_of_a_run_runs_again_to_the_same_file(run, tmp_path: Path):
    recipe = load_recipe(run.model / "recipe.yaml")
    assert all(entry.sha256 for entry in recipe.experts.values())
    again = run_recipe(replace(recipe, output=tmp_path / "again"))
    assert (again.model / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    assert (again.model / "README.md").read_bytes() == (run.model / "README.md").read_bytes()


def test_a_model_that_is_loaded_and_saved_brings_its_card_along(run, tmp_path: Path):
    load_merged(str(run.model)).save_pretrained(tmp_path / "model")
    first, second = ({path.name: path for path in folder.iterdir()} for folder in (run.model, tmp_path / "model"))
    assert first.keys() == second.keys() >= {REFIT_PICTURE, DEPTH_PICTURE}
    for name in ("README.md", "recipe.yaml", "modeling_hf_zipit.py", "model.safetensors"):
        assert first[name].read_bytes() == second[name].read_bytes()


def test_the_card_tells_what_was_measured(run):
    card = (run.model / "README.md").read_text()
    assert not problems(card)
    data = yaml.safe_load(card.split("---\n")[1])
    (entry,) = data["model-index"]
    values = {m["name"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    kept = run.kept.accuracy
    expected = {f"accuracy on {task}": value for task, value in kept.per_task.items()} | {"joint accuracy": kept.joint}
    scores = {f"{name} on {task}": value for task, found in run.kept.scores.items() for name, value in found.items()}
    assert values == pytest.approx(expected | scores, abs=1e-5)
    assert list(values)[:3] == ["accuracy on low", "accuracy on high", "joint accuracy"]
    assert list(values)[3:] == ["f1 on low", "perplexity on low", "f1 on high", "perplexity on high"]
    for metric in ("f1", "perplexity"):
        for name, found in (("experts side by side", run.expert_scores), ("**this model**", run.kept.scores)):
            assert f"| {metric} | {name} | {found['low'][metric]:.4g} | {found['high'][metric]:.4g} |" in card
    for text in ("# digits", "experts side by side", DEPTH_PICTURE, REFIT_PICTURE, "The best of them", "```yaml"):
        assert text in card
    assert "observed on 64 unlabelled samples from sklearn-digits" in card


def test_a_card_of_other_weights_claims_nothing(run, tmp_path: Path):
    model = load_merged(str(run.model))
    with torch.no_grad():
        model.branch("low").classifier.bias.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "weights were changed after the merge" in card
    assert "## Results" not in card and "model-index" not in card and "refit left" not in card
    assert not (tmp_path / "tuned" / REFIT_PICTURE).exists()


def test_results_survive_the_configuration_in_the_order_of_the_tasks(run):
    model = load_merged(str(run.model))
    found = Result.of(model, "digits")
    assert found.merged == run.kept.accuracy and found.experts == run.experts
    assert found.scores == run.kept.scores and found.expert_scores == run.expert_scores
    assert isinstance(found.merged, Accuracies) and list(found.merged.per_task) == list(DIGITS)
    assert [(p.method, p.depth) for p in found.curve] == [(row.method, row.depth) for row in run.rows]
    assert not found.changed


def test_a_merge_from_python_gives_a_recipe_that_lacks_only_the_data(experts: dict[str, Path], tmp_path: Path):
    images = torch.randn(16, 1, 8, 8)
    settings = {"options": {"alpha": 0.3}, "refit": {"ridge": 1e-3}, "corrections": ["repair"]}
    merged = hf_zipit.merge(experts, images, method="zip", **settings)
    merged.save_pretrained(tmp_path / "both")
    text = (tmp_path / "both" / "recipe.yaml").read_text()
    assert text.startswith("# Merged from Python")
    written = recorded_recipe(load_merged(str(tmp_path / "both")), "both")
    assert written == yaml.safe_load(text)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written | {"calibration": {"dataset": "sklearn-digits"}}))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.method == ("zip+refit",) and recipe.options == {"zip+refit": {"alpha": 0.3}}
    assert recipe.refit.ridge == 1e-3 and recipe.seed == 0
    assert list(recipe.config("zip+refit", 1.0).corrections) == ["repair"]
    assert {task: entry.model for task, entry in recipe.experts.items()} == {t: str(f) for t, f in experts.items()}


def test_what_is_in_order_stays_in_order_through_a_configuration_file(experts: dict[str, Path], tmp_path: Path):
    """Files sort the keys of mappings; which override decides and what is corrected first must not change by that."""
    corrections = ["repair", "batchnorm-reset"]
    overrides = {"*.mlp.fc1": "identity", "*.fc1": "zip"}
    recipe = Recipe(
        name="digits",
        experts={task: ExpertEntry(model=str(folder)) for task, folder in experts.items()},
        calibration=CalibrationData(dataset="sklearn-digits", samples=16),
        method=("permute",),
        settings={"corrections": corrections, "overrides": overrides},
        output=tmp_path / "run",
    )
    by_recipe = run_recipe(recipe).model
    merged = hf_zipit.merge(
        experts, torch.randn(16, 1, 8, 8), method="permute", corrections=corrections, overrides=overrides
    )
    merged.save_pretrained(tmp_path / "python")
    for folder in (by_recipe, tmp_path / "python"):
        written = yaml.safe_load((folder / "recipe.yaml").read_text())
        for found in (written, recorded_recipe(load_merged(str(folder)), "digits")):
            found = {**found, "calibration": {"dataset": "sklearn-digits"}}
            config = Recipe.from_dict(found).config("permute", 1.0)
            assert list(config.corrections) == corrections
            assert list(config.overrides.items()) == list(overrides.items())


RUNS = {
    "auto": {"threads": None},  # what there was is written down
    "auto with settings": {"refit": RefitConfig(ridge=1e-3), "seed": 4},
    "settings": {
        "method": ("zip",),
        "depth": ("vit.layers.1",),
        "options": {"zip": {"beta": 0.5}},
        "settings": {
            "residual": "identity",
            "overrides": {"*.mlp.fc1": "permute", "*.fc1": "identity"},
            "corrections": ["repair"],
            "row_fraction": 0.5,
        },
        "seed": 5,
    },
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_the_command_runs_the_recipe_beside_a_model_to_the_same_file_whatever_threads_there_are(
    changes: dict[str, Any],
    experts: dict[str, Path],
    call: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = Recipe(
        name="digits",
        experts={task: ExpertEntry(model=str(folder)) for task, folder in experts.items()},
        calibration=CalibrationData(dataset="sklearn-digits", samples=16),
        output=tmp_path / "first",
        **{"threads": 1, **changes},
    )
    with cpu_threads(1):
        first = run_recipe(recipe).model
    monkeypatch.chdir(tmp_path)
    with cpu_threads(2):
        code, _, err = call("run", first / "recipe.yaml", "-q")
    assert code == 0, err
    again = tmp_path / "out" / "digits" / "model"
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (again / "recipe.yaml").read_bytes() == (first / "recipe.yaml").read_bytes()


def test_a_model_that_was_put_together_by_hand_has_no_recipe():
    from tests.modeling.by_hand import FAMILIES, make_experts, merge_by_hand

    shared = FAMILIES["vit"].part
    assert recorded_recipe(merge_by_hand(make_experts("vit", shared), shared), "x") == {}


def test_a_recipe_of_models_without_classes_measures_what_it_names(tmp_path: Path):
    names = ("pixel_values", "input_ids", "attention_mask")
    experts, data = dict(zip("ab", tiny.pair("clip", (0, 1)), strict=True)), tmp_path / "pairs"
    rows = {name: tensor.numpy() for name, tensor in make_inputs("clip", batch=6).items() if name in names}
    Dataset.from_dict(rows).save_to_disk(data)
    for task, expert in experts.items():
        expert.save_pretrained(tmp_path / task)
    recipe = Recipe(
        name="pairs",
        experts={task: ExpertEntry(model=str(tmp_path / task)) for task in experts},
        evaluation=Measured(dataset=str(data), metrics=("retrieval_recall",)),
        method=("identity",),
        depth=(1.0, 0.0),
        output=tmp_path / "out",
    )
    ran = run_recipe(recipe)
    assert ran.experts is None and ran.plot is None and ran.kept.accuracy is None
    assert ran.rows[1].scores == ran.expert_scores  # side by side
    card = (ran.model / "README.md").read_text()
    assert not problems(card)
    assert f"| recall@1 | **this model** | {ran.kept.scores['a']['recall@1']:.4g} |" in card
    assert "type: recall@1" in card and "Accuracy on" not in card
