"""Tables, pictures and cards say what was measured, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from hf_zipit.evaluation.results import Accuracy
from hf_zipit.experts.origins import common_licence
from hf_zipit.hub.cache import is_repo
from hf_zipit.modeling import ZipItConfig
from hf_zipit.report.card import Point, Result, card_text
from hf_zipit.report.doctor import Check, checks_table, examine, release
from hf_zipit.report.plots import accuracy_over_depth
from hf_zipit.report.tables import results_table, share
from tests.hub.card_rules import problems

EXPERTS = Accuracy({"clothes": 0.91, "shoes": 0.97}, {"clothes": 0.5, "shoes": 0.7}, {"clothes": 10, "shoes": 30})


@dataclass(frozen=True)
class Row:
    method: str
    depth: float
    accuracy: Accuracy | None
    parameters: int = 1234567
    seconds: float = 0.25


def rows() -> list[Row]:
    found = []
    for method, loss in (("zip", 0.2), ("permute", 0.3)):
        for depth in (1.0, 0.5, 0.0):
            per_task, joint = (
                {task: value - loss * depth for task, value in values.items()}
                for values in (EXPERTS.per_task, EXPERTS.joint_per_task)
            )
            found.append(Row(method, depth, Accuracy(per_task, joint, EXPERTS.samples)))
    return found


def printed(table) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


class ZipItForImageClassification:
    """What a card reads of a merged model, without a model."""

    main_input_name = "pixel_values"
    auto_class = "AutoModelForImageClassification"

    def __init__(self, depth: float = 0.5, **method) -> None:
        labels = {"clothes": {0: "shirt", 1: "pull|over"}, "shoes": {0: "boot", 1: "sandal"}}
        self.config = ZipItConfig(
            tasks=list(labels), task_labels=labels, depth=depth, method={"method": "zip", **method},
            source_architecture="ViTForImageClassification", source_config={"model_type": "vit"},
        )  # fmt: skip
        if isinstance(self.config.source_config, dict):
            self.config.source_config = SimpleNamespace(**self.config.source_config)


def card(model=None, recipe: str = "name: both\n", **changes) -> ModelCard:
    result = {
        "name": "both",
        "base_models": {"clothes": "me/vit-clothes", "shoes": "me/vit-shoes"},
        "dataset": "me/pictures",
        "split": "test",
        "merged": rows()[0].accuracy,
        "experts": EXPERTS,
        "parameters": 1000,
        "expert_parameters": 2000,
        **changes,
    }
    return ModelCard(card_text(model or ZipItForImageClassification(), Result(**result), recipe))


def test_the_table_has_a_line_for_every_merge_and_one_for_the_experts():
    text = printed(results_table(rows(), EXPERTS, 2_469_134))
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.search(r"\d", line)]
    assert lines[0] == ["experts side by side", "-", ".910", ".970", ".940", ".650", "2,469,134", "-"]
    assert [line[:2] for line in lines[1:]] == [[row.method, f"{row.depth:.2f}"] for row in rows()]
    assert lines[1][2:4] == [".710", ".770"]


def test_a_table_without_measurements_has_no_columns_for_them():
    text = printed(results_table([Row("zip", 1.0, None)], None, 10))
    assert "joint" not in text and "1,234,567" in text


@pytest.mark.parametrize(("value", "text"), [(1.0, "1.000"), (0.5, ".500"), (0.0, ".000"), (None, "-")])
def test_shares_are_printed_with_three_digits(value, text):
    assert share(value) == text


def test_the_picture_holds_every_number():
    figure = accuracy_over_depth(rows(), EXPERTS)
    assert len(figure.axes) == 3
    measures = [lambda a: a.per_task["clothes"], lambda a: a.per_task["shoes"], lambda a: a.joint]
    for axis, measure in zip(figure.axes, measures, strict=True):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert set(lines) == {"zip", "permute", "experts"}
        for method in ("zip", "permute"):
            drawn = list(zip(*lines[method].get_data(), strict=True))
            assert drawn == sorted((row.depth, measure(row.accuracy)) for row in rows() if row.method == method)
        assert set(lines["experts"].get_ydata()) == {measure(EXPERTS)}


def test_many_tasks_are_drawn_as_their_mean_and_shared_classes_without_joint():
    tasks = {str(i): i / 10 for i in range(5)}
    found = Accuracy(tasks, {}, dict.fromkeys(tasks, 1))
    figure = accuracy_over_depth([Row("zip", 1.0, found), Row("zip", 0.0, found)], found)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["mean of 5 tasks"]


def test_the_cards_metadata_is_what_the_hub_reads():
    data = card().data
    assert data.base_model == ["me/vit-clothes", "me/vit-shoes"]
    raw = yaml.safe_load(data.to_yaml())
    assert raw["base_model_relation"] == "merge"
    assert (raw["library_name"], raw["pipeline_tag"]) == ("hf_zipit", "image-classification")
    assert {"merge", "vit"} <= set(raw["tags"])
    merged = rows()[0].accuracy
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == pytest.approx(
        {
            "accuracy on clothes": merged.per_task["clothes"],
            "accuracy on shoes": merged.per_task["shoes"],
            "joint accuracy": merged.joint,
        }
    )


def test_folders_and_trained_experts_are_no_base_models(tmp_path):
    data = card(base_models={"clothes": str(tmp_path), "shoes": None}).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    assert is_repo("me/vit") and is_repo("bert") and not is_repo("./me/vit") and not is_repo("a/b/c")


def test_the_card_tells_tasks_results_and_recipe():
    text = card().text
    assert "| clothes | me/vit-clothes | shirt, pull\\|over |" in text
    assert "| **this model** | .710 | .770 | .740 | .450 |" in text
    assert "The first 50 % of the blocks are shared" in text
    assert "AutoModelForImageClassification.from_pretrained" in text
    assert 'model(pixel_values=x, task="shoes")' in text
    assert "```yaml\nname: both\n```" in text


def test_the_card_tells_of_the_refit_and_of_the_depth():
    refitted = card(ZipItForImageClassification(depth=1.0, refit={"ridge": 1e-4})).text
    assert "(refit)" in refitted and "All blocks are shared" in refitted
    apart = card(ZipItForImageClassification(depth=0.0)).text
    assert "(refit)" not in apart and "Nothing is shared" in apart


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"merged": None, "experts": None, "dataset": None},
        {"base_models": {"clothes": None, "shoes": None}},
        {"licence": {"license": "mit"}, "datasets": ["me/clothes", "me/shoes"], "calibration": "me/clothes"},
        {"licence": {"license": "other", "license_name": "mine", "license_link": "LICENSE"}},
        {"curve": [Point(row.method, row.depth, row.parameters, row.accuracy) for row in rows()]},
        {"changed": True},
    ],
)
def test_the_hub_accepts_the_metadata(changes):
    made = card(**changes)
    assert not problems(str(made))
    assert "\n\n\n" not in str(made)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("base_model: [/home/me/vit]\nbase_model_relation: merge", "no repo id"),
        ("base_model: [me/vit]\nbase_model_relation: merged", "base_model_relation"),
        ("base_model_relation: merge", "go together"),
        ("pipeline_tag: image-classifier", "pipeline_tag"),
        ("license: other", "license_name"),
        ("datasets: []", "empty"),
        ("model-index: [{name: a, results: [{task: {type: x}, dataset: {type: y}, metrics: []}]}]", "dataset.name"),
        ("tags: [a, a]", "different"),
        ("a: b: c", "no YAML"),
    ],
)
def test_the_rules_refuse_what_the_hub_would(wrong, told):
    assert any(told in problem for problem in problems(f"---\n{wrong}\n---\n# x\n"))


def test_licence_and_data_sets_are_the_experts():
    data = card(licence={"license": "mit"}, datasets=["me/a"], calibration="me/b").data
    assert data.license == "mit"
    assert data.datasets == ["me/a", "me/b", "me/pictures"]
    assert common_licence({"a": {"licence": {"license": "mit"}}, "b": {"licence": {"license": "mit"}}}) == {
        "license": "mit"
    }
    assert common_licence({"a": {"licence": {"license": "mit"}}, "b": {}}) == {}
    assert common_licence({}) == {}


def test_other_depths_and_methods_are_told_where_they_were_measured():
    points = [Point(row.method, row.depth, row.parameters, row.accuracy) for row in rows()]
    text = card(curve=points).text
    assert "accuracy_over_depth.png" in text
    assert "| zip | 0.50 | 1,234,567 | .840 | .550 |" in text
    assert "accuracy_over_depth.png" not in card(curve=points[:1]).text


def test_changed_weights_claim_nothing():
    text = card(merged=None, changed=True).text
    assert "weights were changed after the merge" in text and "## Results" not in text


def test_a_card_without_measurements_claims_none():
    made = card(merged=None, experts=None, dataset=None, recipe="")
    assert not made.data.eval_results
    assert "## Results" not in made.text and "## Recipe" not in made.text


def test_versions_are_compared_by_number():
    assert release("2.13.0+cpu") == (2, 13, 0) > release("2.6")


def test_every_finding_that_is_not_good_names_a_remedy():
    checks = examine()
    assert {"torch", "devices", "Hub"} <= {check.what for check in checks}
    assert all(check.remedy for check in checks if not check.good)
    assert "pip install x" in printed(checks_table([Check("x", "missing", False, "pip install x")]))
