"""Tables, pictures and cards say what was measured, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from hf_zipit.evaluation.results import Accuracies, Measurement
from hf_zipit.experts.licences import merged_licence
from hf_zipit.grouping.grouping import Grouping
from hf_zipit.hub.cache import is_repo
from hf_zipit.landscapes.results import Curve, Landscape, Plane
from hf_zipit.modeling import ZipItConfig
from hf_zipit.refit import RefitReport
from hf_zipit.report.card import Result, card_text
from hf_zipit.report.doctor import Check, checks_table, examine
from hf_zipit.report.frontier import frontier_picture, staircase
from hf_zipit.report.grouping import disturbance
from hf_zipit.report.landscape import contours, interpolation
from hf_zipit.report.plots import accuracy_over_depth, look, refit_picture
from hf_zipit.report.tables import results_table, share
from hf_zipit.searching.result import SearchResult, Trial
from hf_zipit.searching.space import Setting
from tests.hub.card_rules import problems

EXPERTS = Accuracies({"clothes": 0.91, "shoes": 0.97}, {"clothes": 0.5, "shoes": 0.7}, {"clothes": 10, "shoes": 30})


def row(method: str, depth: float, accuracy: Accuracies | None) -> Measurement:
    return Measurement(method, depth, 1234567, accuracy, seconds=0.25)


def rows() -> list[Measurement]:
    found = []
    for method, loss in (("zip", 0.2), ("permute", 0.3)):
        for depth in (1.0, 0.5, 0.0):
            per_task, joint = (
                {task: value - loss * depth for task, value in values.items()}
                for values in (EXPERTS.per_task, EXPERTS.joint_per_task)
            )
            found.append(row(method, depth, Accuracies(per_task, joint, EXPERTS.samples)))
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
    assert lines[0] == ["experts side by side", "-", ".910", ".970", ".940", ".650", "100.0 %", "2,469,134", "-"]
    merges = [line[line[0] == "best" :] for line in lines[1:]]
    assert [line[:2] for line in merges] == [[row.method, f"{row.depth:.2f}"] for row in rows()]
    assert merges[0][2:4] == [".710", ".770"]
    merged = [row for row in rows() if row.depth]
    marked = [row for row, line in zip(rows(), lines[1:], strict=True) if line[0] == "best"]
    assert marked == [max(merged, key=lambda row: row.accuracy.mean)]
    assert merges[0][6] == f"{100 * rows()[0].accuracy.mean / EXPERTS.mean:.1f} %"


def test_a_table_without_measurements_has_no_columns_for_them():
    text = printed(results_table([row("zip", 1.0, None)], None, 10))
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
    found = Accuracies(tasks, {}, dict.fromkeys(tasks, 1))
    figure = accuracy_over_depth([row("zip", 1.0, found), row("zip", 0.0, found)], found)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["mean of 5 tasks"]


LONG = "satellite-images-and-handwritten-digits-of-three-continents"
METHODS = ["average", *(name + end for name in ("permute", "zip", "weights", "orthogonal") for end in ("", "+refit"))]


def long_names(tasks: int) -> list[str]:
    return ["handwritten digits of the world", *(f"satellite images {i}" for i in range(1, tasks))]


def depth_picture(tasks: int):
    found = [
        row(method, i / 12, Accuracies(dict.fromkeys(long_names(tasks), 0.5 + i / 30), {}, {}))
        for method in METHODS
        for i in range(13)
    ]
    return accuracy_over_depth(found, found[0].accuracy, title=LONG)


def search_result() -> SearchResult:
    found = [
        Trial(i, Setting(METHODS[i % len(METHODS)], 1.0), (i * 7 % 10) / 10, None, 10 + i * 5 % 11, 10 + i * 3 % 7)
        for i in range(30)
    ]
    samples = {"handwritten digits of the world": 500, "satellite images": 477}
    accuracy = Accuracies(dict.fromkeys(samples, 0.97), {}, samples)
    return SearchResult(tuple(found), "mean", "experts", samples, accuracy, 10, 10, "grid", 0)


def made_landscape() -> Landscape:
    tasks = long_names(2)
    at, flat = (0.0, 0.5, 1.0), dict.fromkeys(tasks, (0.1, 0.7, 0.2))
    grid = {task: tuple(tuple(0.1 + x * x + y * y for x in at) for y in at) for task in tasks}
    plane = Plane(grid, grid, {tasks[0]: (0, 0), tasks[1]: (1, 0), "merge": (0.5, 0.4)}, at, at, True)
    curves = (Curve(flat, flat, method, at, method == "identity") for method in ("zip", "identity"))
    return Landscape(tuple(tasks), "zip+refit", 0.75, "experts", dict.fromkeys(tasks, 9), *curves, plane)


def made_grouping() -> Grouping:
    tasks = long_names(5)
    loses = {task: {other: i - 1.234 * j for j, other in enumerate(tasks) if j != i} for i, task in enumerate(tasks)}
    return Grouping((), loses, loses, "zip+refit", "experts", dict.fromkeys(tasks, 9)).divided(2)


def refitted(modules: int, tasks: int):
    paths = [f"vit.layers.{i}.attention.output.dense" for i in range(modules)]
    report = RefitReport((), {path: {task: i / 40 for i, task in enumerate(long_names(tasks))} for path in paths})
    return refit_picture(report, LONG)


PICTURES = {
    "depth, many methods and depths": lambda: depth_picture(3),
    "depth, one panel": lambda: depth_picture(5),
    "frontier": lambda: frontier_picture(search_result(), LONG),
    "contours": lambda: contours(made_landscape(), LONG),
    "interpolation": lambda: interpolation(made_landscape(), LONG),
    "who disturbs whom": lambda: disturbance(made_grouping(), LONG),
    "refit, few modules": lambda: refitted(2, 2),
    "refit, many modules and tasks": lambda: refitted(60, 9),
}


def tick_labels(axis) -> list[list]:
    """The labels of both of an axis's scales; matplotlib keeps some that are out of sight."""
    shown = []
    for place, scale, limits in ((0, axis.xaxis, axis.get_xlim()), (1, axis.yaxis, axis.get_ylim())):
        low, high = sorted(limits)
        named = [label for label in scale.get_majorticklabels() if label.get_text() and label.get_visible()]
        shown.append([label for label in named if low <= label.get_position()[place] <= high])
    return shown


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_nothing_in_a_picture_is_cut_off_or_runs_into_something_else(draw):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw()
    FigureCanvasAgg(figure).draw()
    around = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    labels = [label for axis in figure.axes for label in (axis.yaxis.label, axis.xaxis.label) if label.get_text()]
    inside = [text for axis in figure.axes for text in (axis.title, axis._left_title, *axis.texts) if text.get_text()]
    ticks = [shown for axis in figure.axes for shown in tick_labels(axis)]
    whole = figure.bbox.padded(2)
    for text in (*around, *labels, *inside, *(label for shown in ticks for label in shown)):
        box = text.get_window_extent()
        assert whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1), f"{text} is cut off"
    boxes = [text.get_window_extent() for text in (*around, *labels)]
    for one, other in [*combinations(boxes, 2), *(pair for shown in ticks for pair in touching(shown))]:
        assert not one.overlaps(other)


def touching(shown: list) -> Iterator[tuple]:
    return combinations([label.get_window_extent() for label in shown], 2)


def test_many_things_of_a_picture_look_different():
    looks = [tuple(look(i).values()) for i in range(49)]
    assert len(set(looks)) == len(looks)


def test_the_line_of_the_frontier_is_the_best_score_for_the_cost():
    result = search_result()
    for axis, cost in zip(frontier_picture(result).axes, ("parameters", "macs"), strict=True):
        line = next(line for line in axis.get_lines() if line.get_label() == "best for the cost")
        costs, scores = line.get_data()
        assert list(costs) == sorted(costs) and list(scores) == sorted(scores)
        for at, score in zip(costs, scores, strict=True):
            affordable = [t.score for t in result.trials if getattr(t, cost) <= at * 10 + 1e-9]
            assert score == max(affordable)
    assert staircase([(2, 1.0), (1, 1.0), (1, 0.5), (3, 0.9), (4, 2.0)]) == [(1, 1.0), (4, 2.0)]


SCORES = {"clothes": {"f1": 0.5, "accuracy": 0.71}, "shoes": {"f1": 0.25}}


def test_further_metrics_are_in_the_table_and_in_the_metadata():
    made = card(scores=SCORES, expert_scores={"clothes": {"f1": 0.75}, "shoes": {"f1": 1.0}})
    assert not problems(str(made))
    for line in (
        "| metric | model | clothes | shoes |",
        "| f1 | experts side by side | 0.75 | 1 |",
        "| f1 | **this model** | 0.5 | 0.25 |",
        "| accuracy | **this model** | 0.71 | - |",
    ):
        assert line in made.text
    values = [(result.metric_name, result.metric_type, result.metric_value) for result in made.data.eval_results]
    assert {("f1 on clothes", "f1", 0.5), ("f1 on shoes", "f1", 0.25)} < set(values)
    assert len(values) == 5, "the accuracy of a task is told once"


def test_a_model_without_accuracies_tells_its_metrics():
    scores = {"clothes": {"recall@1": 0.5}, "shoes": {"recall@1": 0.25}}
    made = card(merged=None, experts=None, scores=scores)
    assert not problems(str(made))
    assert made.text.count("## Results") == 1 and "Accuracy on" not in made.text
    assert "| recall@1 | **this model** | 0.5 | 0.25 |" in made.text and "experts side by side |" not in made.text
    assert [result.metric_type for result in made.data.eval_results] == ["recall@1"] * 2


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
    assert "| clothes | [me/vit-clothes](https://huggingface.co/me/vit-clothes) | shirt, pull\\|over | - |" in text
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
        {"curve": rows()},
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
    assert card(dataset="me/a, me/b", calibration="me/b, sklearn-digits").data.datasets == ["me/b", "me/a"]


@pytest.mark.parametrize(
    ("licences", "merged"),
    [
        (["mit", "mit"], "mit"),
        (["mit", "apache-2.0", "bsd-3-clause"], "apache-2.0"),
        (["gpl-3.0", "apache-2.0"], "gpl-3.0"),
        (["mit", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-sa-4.0", "cc-by-4.0"], "cc-by-sa-4.0"),
        (["llama3", "llama3"], "llama3"),
        (["gpl-3.0", "cc-by-nc-4.0"], None),
        (["llama3", "mit"], None),
        (["mit", None], None),
        ([], None),
    ],
)
def test_the_licence_asks_for_all_that_the_experts_do_or_is_not_claimed(licences, merged):
    experts = {str(i): {"licence": {"license": name}} if name else {} for i, name in enumerate(licences)}
    assert merged_licence(experts) == ({"license": merged} if merged else {})
    assert merged_licence(dict(reversed(experts.items()))) == merged_licence(experts)


def test_other_depths_and_methods_are_told_where_they_were_measured():
    points = rows()
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


def test_every_finding_that_is_not_good_names_a_remedy():
    checks = examine()
    assert {"torch", "devices", "Hub"} <= {check.what for check in checks}
    assert all(check.remedy for check in checks if not check.good)
    assert "pip install x" in printed(checks_table([Check("x", "missing", False, "pip install x")]))
