"""Search: the division of the data, the space, the frontier, and trials that repeat themselves with the same seed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import hf_zipit.observation.shared
import hf_zipit.searching.trials as searching
from hf_zipit import Calibration, MergeConfig, merge, search
from hf_zipit.adapters import adapter_for
from hf_zipit.data.held_out import divide, held_out
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.evaluation.measure import accuracy
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.report.frontier import save_search, search_notes, search_table
from hf_zipit.running.exploring import recipe_space, search_recipe
from hf_zipit.running.run import run_recipe
from hf_zipit.searching import Range, SearchResult, SearchSpace, Setting, Trial
from hf_zipit.searching.costs import expert_macs, merged_macs
from hf_zipit.symmetry import MergeSpec
from tests import tiny
from tests.cli.conftest import call
from tests.recipe.test_recipe import TINY, written

__all__ = ["call"]  # a fixture

TASKS = ("few", "more")
SAMPLES = 16


@cache
def experts() -> dict[str, Any]:
    return dict(zip(TASKS, tiny.pair("vit"), strict=True))


@cache
def images(seed: int = 0, samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(samples, 3, 16, 16, generator=generator) for task in TASKS}


def found(**arguments: Any) -> SearchResult:
    return search(experts(), images(), **arguments)


def told(result: SearchResult) -> dict[str, Any]:
    """Everything but the time."""
    content = result.to_dict()
    for trial in content["trials"]:
        del trial["seconds"]
    return content


# --------------------------------------------------------------------------------------------- the division


def read(data: Any, models: dict[str, Any] | None = None) -> Calibration:
    return Calibration(data).read(models or experts())


def numbers(data: Calibration, task: str) -> list[int]:
    """Which samples of a task there are: each holds its own number."""
    return data.whole(task)["pixel_values"][:, 0, 0, 0].int().tolist()


def collections() -> dict[str, Any]:
    numbered = torch.arange(10.0)[:, None, None, None].expand(10, 3, 16, 16)
    samples = [{"pixel_values": row} for row in numbered]
    return {
        "tensor": numbered,
        "array": numbered.numpy(),
        "columns": {"pixel_values": numbered},
        "list": samples,
        "dataset": Dataset.from_dict({"pixel_values": numbered[:, :1, :1, :1].tolist()}),
        "loader": DataLoader(numbered, batch_size=4, shuffle=True),
        "stream": iter(numbered.split(4)),
    }


@pytest.mark.parametrize("kind", list(collections()))
def test_no_sample_is_on_both_sides_and_none_is_lost(kind):
    data = read({task: collections()[kind] for task in TASKS})
    rest, held = divide(data, 0.25, seed=1)
    for task in TASKS:
        assert len(numbers(held, task)) == 3  # a quarter of ten, rounded up
        assert sorted(numbers(held, task) + numbers(rest, task)) == list(range(10))
    again, _ = divide(data, 0.25, seed=1)
    other, _ = divide(data, 0.25, seed=2)
    assert numbers(again, "few") == numbers(rest, "few") != numbers(other, "few")


def test_what_cannot_be_divided_is_told():
    with pytest.raises(DataError, match="has 1 samples"):
        divide(read(torch.zeros(1, 3, 16, 16)), 0.5)
    for share in (0, 1, -0.5):
        with pytest.raises(RecipeError, match="held out"):
            divide(read(images()), share)


def test_the_experts_agree_with_their_own_answers_but_not_with_wrong_labels():
    by_experts = held_out(read(images()), experts())
    assert by_experts.answers == "experts"
    assert accuracy(experts(), by_experts.tasks).per_task == {"few": 1.0, "more": 1.0}
    wrong = {
        task: {"pixel_values": images()[task], "labels": (columns.tensors["labels"] + 1) % 3}
        for task, columns in by_experts.tasks.items()
    }
    by_labels = held_out(read(wrong), experts())
    assert by_labels.answers == "labels"
    assert accuracy(experts(), by_labels.tasks).per_task["few"] == 0.0
    assert held_out(read(wrong), experts(), answers="experts").answers == "experts"
    with pytest.raises(DataError, match="labels"):
        held_out(read(images()), experts(), answers="labels")


def test_one_collection_for_all_tasks_is_scored_by_every_expert():
    rest, held = divide(read(images()["few"]), 0.25)
    found = held_out(held, experts())
    assert rest.counts == {None: 12}
    assert found.counts == {"few": 4, "more": 4}


def test_padding_is_no_answer():
    model = tiny.build("bert-token", num_labels=3)
    texts = [{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 7], [8, 9])]
    models = {"a": model, "b": model}
    found = held_out(read({"a": texts, "b": texts}, models), models)
    assert (found.tasks["a"].tensors["labels"] == -100).tolist() == [[False] * 3, [False, False, True]]


def test_features_need_a_score_of_their_own():
    features = dict(zip(TASKS, tiny.pair("vit-features"), strict=True))
    with pytest.raises(DataError, match="score"):
        search(features, images())
    seen = []
    result = search(
        features, images(), space={"method": ["identity"], "depth": 1, "residual": "match"},
        score=lambda merged: seen.append(merged.config.tasks) or 0.5,
    )  # fmt: skip
    assert seen == [list(TASKS)]
    assert (result.best.score, result.best.accuracy, result.measure) == (0.5, None, "own")


# ------------------------------------------------------------------------------------------------- the space


def test_options_count_for_their_method_only():
    space = SearchSpace.of(
        {"method": ["permute", "zip", "zip+refit"], "depth": [1, 0.5], "residual": "match",
         "options": {"zip": {"alpha": [0.1, 0.3]}}, "refit": {"own_task_weight": [0.5, 1.0]}}
    )  # fmt: skip
    grid = space.grid()
    assert len(grid) == 2 * (1 + 2 + 2 * 2)
    assert len({str(setting.to_dict()) for setting in grid}) == len(grid)
    by_method = {setting.method: setting for setting in grid}
    assert by_method["permute"].options == {} and by_method["permute"].refit is None
    assert by_method["zip"].refit is None
    assert by_method["zip+refit"].config({"seed": 3}) == MergeConfig(
        method="zip", options={"alpha": 0.3}, depth=0.5, residual="match", refit={"own_task_weight": 1.0}, seed=3
    )


def test_refit_is_for_all_where_no_name_asks_for_it():
    assert all(setting.refit == {} for setting in SearchSpace.of({"method": ["zip", "permute"], "refit": True}).grid())
    assert {s.method: s.refit for s in SearchSpace.of({"method": ["zip+refit", "zip"]}).grid()} == {
        "zip+refit": {}, "zip": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"methods": ["zip"]}, "did you mean 'method'"),
        ({"method": ["zpi"]}, "did you mean 'zip'"),
        ({"method": []}, "empty"),
        ({"options": {"zip": {"alhpa": 1.0}}}, "did you mean 'alpha'"),
        ({"options": {"dual": {"balance": 0.5}}}, "no method of the space"),
        ({"refit": {"own": 1}}, "refit.own is no known key"),
        ({"depth": {"low": 0}}, "high is missing"),
        ({"depth": {"low": 1, "high": 0}}, "begin below"),
        ({"method": "zip", "options": {"zip": {"alpha": {"low": 0.0, "high": 1.0}}}}, "grid needs lists"),
    ],
)
def test_a_wrong_space_is_told_before_anything_is_loaded(space, message):
    with pytest.raises(RecipeError, match=message):
        search({"a": "/nowhere", "b": "/nowhere"}, None, space=space)


def test_wrong_settings_of_the_search_are_told():
    for wrong in ({"sampler": "luck"}, {"trials": 0}, {"score": "best"}, {"max_size": 0}):
        with pytest.raises(RecipeError):
            found(**wrong)


# ------------------------------------------------------------------------------------------------- the trials

SMALL = {"method": ["permute", "zip"], "depth": [1.0, 0.0], "residual": "match"}
WIDE = {
    "method": ["permute", "zip", "dual"],
    "depth": [1.0, 0.5],
    "options": {"zip": {"alpha": Range(0.0, 1.0), "beta": [0.0, 1.0]}, "dual": {"balance": Range(0.1, 0.9)}},
}


def test_side_by_side_agrees_with_the_experts_and_is_the_largest():
    result = found(space=SMALL)
    assert result.answers == "experts" and result.samples == {"few": 4, "more": 4}
    assert len(result.trials) == 4
    whole = [trial for trial in result.trials if trial.setting.depth == 0.0]
    assert all(trial.score == 1.0 for trial in whole)
    assert all(trial.macs == len(TASKS) * result.expert_macs for trial in whole)
    assert result.best.score == 1.0
    shared = [trial for trial in result.trials if trial.setting.depth == 1.0]
    assert all(trial.parameters < whole[0].parameters and trial.macs < whole[0].macs for trial in shared)
    limited = replace(result, max_size=1.5)
    assert limited.best.setting.depth == 1.0
    with pytest.raises(RecipeError, match="max_size"):
        replace(result, max_size=0.1).best  # noqa: B018


@pytest.mark.parametrize("arguments", [{"space": SMALL}, {"space": WIDE, "sampler": "tpe", "trials": 6}])
def test_the_same_seed_gives_the_same_trials(arguments):
    if arguments.get("sampler") == "tpe":
        pytest.importorskip("optuna")
    one = found(**arguments)
    assert told(one) == told(found(**arguments))
    if "trials" in arguments:
        assert len({str(trial.setting) for trial in one.trials}) == arguments["trials"]
        assert told(one)["trials"] != told(found(**arguments, seed=1))["trials"]


def test_a_small_space_ends_a_tpe_search():
    pytest.importorskip("optuna")
    result = found(space={**SMALL, "depth": 1.0}, sampler="tpe", trials=50)
    assert sorted(trial.setting.method for trial in result.trials) == ["permute", "zip"]


def test_trials_limit_a_grid_to_a_sample_of_it():
    every = {str(setting) for setting in SearchSpace.of(SMALL).grid()}
    result = found(space=SMALL, trials=2)
    assert len(result.trials) == 2
    assert {str(trial.setting) for trial in result.trials} < every


def test_a_failed_merge_is_a_trial_with_a_sentence():
    result = found(
        space={"method": "zip", "depth": 1.0, "residual": "match", "options": {"zip": {"beta": [0.0, 7.0]}}}
    )
    good, bad = result.trials
    assert good.score is not None and not good.error
    assert bad.score is None and "beta" in bad.error
    assert result.best is good and bad not in result.frontier
    assert any("beta" in note for note in search_notes(result))
    failed = replace(result, trials=(bad,))
    with pytest.raises(RecipeError, match="beta"):
        failed.best  # noqa: B018
    assert failed.to_dict()["best"] is None


def test_merges_never_see_what_they_are_scored_on(monkeypatch):
    looked_at, scored_on = [], []

    def watched(experts, calibration, config, **settings):
        looked_at.append(calibration)
        return merge(experts, calibration, config, **settings)

    def scored(model, datasets, **settings):
        scored_on.append(datasets)
        return accuracy(model, datasets, **settings)

    observe = hf_zipit.observation.shared.observe

    def observed(planned, calibration):
        looked_at.append(calibration)
        return observe(planned, calibration)

    monkeypatch.setattr(searching, "merge", watched)
    monkeypatch.setattr(searching, "accuracy", scored)
    monkeypatch.setattr(hf_zipit.observation.shared, "observe", observed)
    found(space={"method": ["permute", "zip+refit"], "depth": [1.0, 0.5], "residual": "match"})
    assert len(looked_at) == 4 + 1  # observed once
    for task in TASKS:
        seen = {row.numpy().tobytes() for data in looked_at for row in data.whole(task)["pixel_values"]}
        asked = {row.numpy().tobytes() for data in scored_on for row in data[task].tensors["pixel_values"]}
        assert (len(seen), len(asked)) == (12, 4)
        assert not seen & asked


def test_shared_moments_change_nothing(monkeypatch):
    """A shallow merge with the moments of the deepest one is the merge with its own, of the same rows."""
    monkeypatch.setattr(
        import_module("hf_zipit.observation.observe"), "MINIMUM_ROWS", 10_000
    )  # all, whatever a depth's budget allows
    rest, held = divide(read(images()), 0.25)
    samples = held_out(held, experts())
    result = found(space={"method": "zip", "depth": [0.5, 1.0], "residual": ["match", "orthogonal"]})
    for trial in result.trials:
        alone = merge(experts(), rest, trial.setting.config({}))
        assert accuracy(alone, samples.tasks) == trial.accuracy


def test_validation_data_takes_the_place_of_what_is_held_out():
    """Then all calibration data is looked at, and may come in batches."""
    labels = {"few": 3, "more": 4}
    validation = {
        task: {"pixel_values": images(1)[task], "labels": torch.arange(SAMPLES) % count}
        for task, count in labels.items()
    }
    loaders = {task: DataLoader(list(data), batch_size=8) for task, data in images().items()}
    result = search(experts(), loaders, validation=validation, space={**SMALL, "depth": 1.0}, score="joint")
    assert result.answers == "labels" and result.samples == {"few": SAMPLES, "more": SAMPLES}
    for trial in result.trials:
        merged = merge(experts(), loaders, trial.setting.config({}))
        assert (
            trial.score == accuracy(merged, {t: held_out(read(validation), experts()).tasks[t] for t in TASKS}).joint
        )


# ----------------------------------------------------------------------------------------------- the frontier


def made_up(seed: int, count: int = 40) -> SearchResult:
    generator = np.random.default_rng(seed)
    trials = [
        Trial(i, Setting("zip"), float(generator.integers(5)), None, *(int(n) for n in generator.integers(1, 6, 2)))
        for i in range(count)
    ]
    return SearchResult((*trials, Trial(count, Setting("zip"), error="no")), "own", None, {}, None, 1, 1, "grid", 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_what_nothing_beats(seed):
    result = made_up(seed)
    good = result.trials[:-1]
    kept = result.frontier
    assert not any(other.beats(trial) for trial in kept for other in good)
    for trial in good:
        equal = any((t.score, t.parameters, t.macs) == (trial.score, trial.parameters, trial.macs) for t in kept)
        assert equal or any(other.beats(trial) for other in kept)
    assert result.best in kept
    assert result.best.score == max(trial.score for trial in good)
    assert [trial.parameters for trial in kept] == sorted(trial.parameters for trial in kept)


# --------------------------------------------------------------------------------------------------- the costs


@pytest.mark.parametrize("depth", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", ["vit-eager", "resnet-basic"])
def test_the_trunk_is_counted_once_and_the_rest_for_every_task(name, depth):
    models = dict(zip(("a", "b", "c"), tiny.pair(name, (0, 1, 2), (3, 3, 3)), strict=True))
    merged = merge(models, method="identity", depth=depth)
    merged.set_attn_implementation("eager")  # fused attention is not counted on a CPU
    first = models["a"]
    inputs = {name: tensor[:1] for name, tensor in adapter_for(first).inputs(first).items()}
    spec = MergeSpec.from_model(first)
    counts = {}
    for key, model in (("expert", first), ("merged", merged)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
        counts[key] = counter.get_total_flops()
    ratio = merged_macs(spec, merged.config, first) / expert_macs(spec)
    assert ratio == pytest.approx(counts["merged"] / counts["expert"], rel=1e-3)


# -------------------------------------------------------------------------------------------------- the recipe


def recipe(folder: Any, **changes: Any) -> Any:
    content = {**TINY, "save": None, "output": str(folder / "out"), **changes}
    return load_recipe(written(folder, {key: value for key, value in content.items() if value is not None}))


def test_a_recipes_best_setting_is_a_recipe_that_runs(tmp_path):
    space = {"method": ["average", "zip+refit"], "depth": 1.0, "refit": {"ridge": [1e-3]}}
    given = recipe(tmp_path, search={"space": space, "hold_out": 0.5, "answers": "experts"})
    result = search_recipe(given)
    assert result.samples == {"few": 12, "more": 12}
    save_search(result, tmp_path / "found", recipe=given, title="tiny")
    assert {"search.json", "frontier.png", "best.yaml"} == {path.name for path in (tmp_path / "found").iterdir()}
    assert json.loads((tmp_path / "found" / "search.json").read_text())["best"] == result.best.number
    best = load_recipe(tmp_path / "found" / "best.yaml")
    assert "search" not in yaml.safe_load((tmp_path / "found" / "best.yaml").read_text())
    ran = run_recipe(best, save="nothing")
    assert [(row.method, row.parameters) for row in ran.rows] == [(result.best.setting.method, result.best.parameters)]


def test_without_a_search_section_the_recipes_own_lists_are_searched(tmp_path):
    given = recipe(tmp_path, options={"zip": {"beta": 1.0}}, residual="identity")
    assert [str(setting) for setting in recipe_space(given).grid()] == [
        "average, depth 1, residual identity",
        "average, depth 0, residual identity",
        "zip, depth 1, beta 1, residual identity",
        "zip, depth 0, beta 1, residual identity",
    ]


def test_the_evaluation_data_is_not_read(tmp_path, monkeypatch):
    given = recipe(tmp_path, method="average", depth=0)
    broken = replace(given, evaluation=replace(given.evaluation, dataset="no-such-data"))
    assert search_recipe(broken).best.score > 0


def test_the_table_names_the_best_and_the_frontier():
    result = found(space=SMALL)
    table = search_table(result)
    marks = list(table.columns[0].cells)
    assert marks.count("best") == 1
    assert marks.count("best") + marks.count("frontier") == len(result.frontier)


def test_the_command_line_searches_and_measures(tmp_path, call):
    """Results on stdout, progress on stderr, files in the folder."""
    content = {**TINY, "save": None, "method": ["average", "zip"], "depth": 1, "output": str(tmp_path / "out")}
    given = written(tmp_path, {key: value for key, value in content.items() if value is not None})
    code, out, err = call("search", given, "--trials", 1, "--json")
    assert code == 0 and len(json.loads(out)["trials"]) == 1 and "searching" in err
    assert (tmp_path / "out" / "search" / "best.yaml").is_file()
    code, out, err = call("landscape", given, "-m", "zip", "--grid", 0, "--samples", 4)
    assert code == 0 and "aligned by zip" in out and "measuring" in err
    assert (tmp_path / "out" / "landscape" / "interpolation.png").is_file()
