"""The model card: what was merged and how, how good it is, how to use it; with metadata that the Hub understands.

Everything comes from the merged model itself: `config.method` remembers the experts, the settings, the refit's errors
and, once `remember` was called, the measurements. So a model that was loaded and is pushed brings its card along.

Invariants: the card claims nothing of weights that it does not have. If they are not those that the merge left
(trained further, cast), it says so and leaves the measurements out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import constants

from hf_zipit.evaluation.intervals import Interval
from hf_zipit.evaluation.results import Accuracies, Measurement, Scores
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.experts.licences import merged_licence
from hf_zipit.extras import installed
from hf_zipit.files import write_text
from hf_zipit.hub.cache import is_repo
from hf_zipit.hub.cards import CARD, MARKER, kept_above
from hf_zipit.hub.processors import FOLDER
from hf_zipit.modeling.hub import companion
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.polish.report import PolishReport
from hf_zipit.refit import RefitReport
from hf_zipit.registry import TRAININGS
from hf_zipit.report.plots import accuracy_over_depth, kept_picture, refit_picture, save_picture
from hf_zipit.report.recorded import recipe_text
from hf_zipit.report.tables import EXPERTS, accuracies, accuracy_words, ends, score_lines
from hf_zipit.schema import packed, plain, unpacked

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from transformers import PreTrainedModel

PIPELINES = {
    "ZipItForImageClassification": "image-classification",
    "ZipItForSequenceClassification": "text-classification",
    "ZipItForTokenClassification": "token-classification",
    "ZipItForMaskedLM": "fill-mask",
    "ZipItForCausalLM": "text-generation",
    "ZipItForAudioClassification": "audio-classification",
    "ZipItForVideoClassification": "video-classification",
    "ZipItForQuestionAnswering": "question-answering",
    "ZipItForCTC": "automatic-speech-recognition",
    "ZipItForConditionalGeneration": "text2text-generation",
    "ZipItForObjectDetection": "object-detection",
    "ZipItForSemanticSegmentation": "image-segmentation",
    "ZipItForDepthEstimation": "depth-estimation",
    "ZipItModel": "feature-extraction",
}
"""The Hub's task of every merged class."""

ZERO_SHOT = "zero-shot-image-classification"

REFIT_PICTURE = "refit_errors.png"
DEPTH_PICTURE = "accuracy_over_depth.png"
RECIPE = "recipe.yaml"
KEPT_PICTURE = "kept.png"
EVAL_RESULTS = ".eval_results"

SOMEWHERE = "path/or/id/of/"
"""What stands before the model's name where its repo is not known yet."""


@dataclass(frozen=True)
class Result:
    """What a card tells beside what the model's configuration says.

    Attributes:
        name: of the merged model.
        base_models: by task the expert's repo id or folder; None for one that was made on the spot.
        dataset: what was measured on, and its `split`.
        merged: the merged model's accuracies, if measured.
        experts: those of the experts side by side.
        scores, expert_scores: further metrics of both, one task at a time.
        parameters: of the merged model.
        expert_parameters: of all experts together.
        calibration: the data set that the experts were observed on, if it has a name.
        curve: merges of the same experts by other methods or at other depths.
        licence: of the merged model, as metadata; empty if the experts' do not go together.
        licences: of every expert, by task, as its card says.
        datasets: that the experts' cards name.
        changed: whether the weights are not those that were measured.
        agreement: how often it answers as the experts do, where there were no labels to measure on.
        read: of the calibration data how many samples of each task were read, and their sha256.
        emissions: what the run emitted, as metadata; see `running.emissions`.
    """

    name: str
    base_models: Mapping[str, str | None]
    dataset: str | None = None
    split: str | None = None
    merged: Accuracies | None = None
    experts: Accuracies | None = None
    scores: Scores = field(default_factory=dict)
    expert_scores: Scores = field(default_factory=dict)
    parameters: int = 0
    expert_parameters: int = 0
    calibration: str | None = None
    curve: Sequence[Measurement] = ()
    licence: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    changed: bool = False
    agreement: Accuracies | None = None
    read: Mapping[str, Any] = field(default_factory=dict)
    emissions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, name: str) -> Result:
        """What a merged model remembers."""
        method = model.config.method
        experts: Mapping[str, Any] = method.get("experts", {})
        measured = method.get("results") or {}
        tasks = model.config.tasks
        changed = "sha256" in method and fingerprint_experts({"": model})[""] != method["sha256"]
        found = {} if changed else measured
        return cls(
            name=name,
            base_models={task: experts.get(task, {}).get("model") for task in tasks},
            dataset=found.get("dataset"),
            split=found.get("split"),
            merged=_accuracy(found.get("merged"), tasks),
            experts=_accuracy(measured.get("experts"), tasks),
            scores=_scores(found.get("scores", ())),
            expert_scores=_scores(found.get("expert_scores", ())),
            parameters=model.num_parameters(),
            expert_parameters=method.get("expert_parameters", 0),
            calibration=measured.get("calibration"),
            curve=[
                Measurement(**{**point, "accuracy": _accuracy(point["accuracy"], tasks)})
                for point in unpacked(found.get("curve", []))
            ],
            licence=merged_licence(experts) if len(experts) == len(tasks) else {},
            licences={
                task: e["licence"]["license"] for task, e in experts.items() if "license" in e.get("licence", {})
            },
            datasets=list(dict.fromkeys(d for e in experts.values() for d in e.get("datasets", []))),
            changed=changed,
            agreement=_accuracy(found.get("agreement"), tasks),
            read=method.get("calibration_data") or {},
            emissions=method.get("emissions") or {},
        )


def remember(model: PreTrainedModel, result: Result) -> None:
    """Write measurements into the model's configuration, from where every later card takes them."""
    plainly = ("dataset", "split", "merged", "experts", "calibration", "agreement")
    point = ("method", "depth", "parameters", "accuracy")  # seconds are others in every run
    model.config.method["results"] = {
        **{name: plain(getattr(result, name)) for name in plainly},
        **{name: _entries(getattr(result, name)) for name in ("scores", "expert_scores")},
        "curve": packed([{name: plain(getattr(row, name)) for name in point} for row in result.curve]),
    }


def _accuracy(saved: Mapping[str, Any] | None, tasks: Sequence[str]) -> Accuracies | None:
    """`Accuracies` from what `to_dict` gave, its tasks in their order, which a configuration file does not keep."""
    if not saved:
        return None
    parts = ("per_task", "joint_per_task", "samples")
    intervals = ("intervals", "joint_intervals", "calibration_error")
    return Accuracies(
        *({task: saved[part][task] for task in tasks if task in saved[part]} for part in parts),
        *({t: Interval(**saved[part][t]) for t in tasks if t in saved.get(part, ())} for part in intervals),
    )


def _entries(scores: Scores) -> list[list[Any]]:
    """Scores as a list of (task, metric, value): a configuration file sorts the keys of mappings."""
    return [[task, name, value] for task, found in scores.items() for name, value in found.items()]


def _scores(entries: Sequence[Sequence[Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for task, name, value in entries:
        found.setdefault(task, {})[name] = value
    return found


def card_metadata(model: PreTrainedModel, result: Result, tags: Sequence[str] = ()) -> ModelCardData:
    """The card's YAML header. Folders are no base models: the Hub would look for a repo of that name."""
    from huggingface_hub import ModelCardData

    measured = _eval_results(model, result)
    repos = list(dict.fromkeys(source for source in result.base_models.values() if source and is_repo(source)))
    used = [name for names in (result.calibration, result.dataset) for name in (names or "").split(", ")]  # of tasks
    datasets = dict.fromkeys([*result.datasets, *(name for name in used if "/" in name)])
    family = model.config.source_config.model_type
    return ModelCardData(
        **result.licence,
        base_model=repos or None,
        base_model_relation="merge" if repos else None,
        co2_eq_emissions=dict(result.emissions) or None,
        datasets=[name for name in datasets if is_repo(name)] or None,
        eval_results=measured or None,
        library_name="hf_zipit",
        model_name=result.name if measured else None,
        pipeline_tag=pipeline_tag(model),
        tags=list(dict.fromkeys(["merge", "model-merging", "multi-task", "zipit", family, *tags])),
    )


def pipeline_tag(model: PreTrainedModel) -> str | None:
    """The Hub's task of a merged model; models of images and texts that put out features compare the two."""
    if model.config.source_architecture.endswith(("CLIPModel", "SiglipModel")):
        return ZERO_SHOT
    return PIPELINES.get(type(model).__name__)


def _eval_results(model: PreTrainedModel, result: Result) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    if result.dataset is None:
        return []
    measures: dict[str, tuple[str, float]] = {}
    if result.merged is not None:
        measures = {f"accuracy on {task}": ("accuracy", value) for task, value in result.merged.per_task.items()}
        if result.merged.joint is not None:
            measures["joint accuracy"] = ("accuracy", result.merged.joint)
    for task, metric, value in _entries(result.scores):
        measures.setdefault(f"{metric} on {task}", (metric, value))
    where = {"dataset_type": result.dataset, "dataset_name": result.dataset, "dataset_split": result.split}
    return [
        EvalResult(
            pipeline_tag(model) or "other", metric_type=kind, metric_name=name, metric_value=round(value, 5), **where
        )
        for name, (kind, value) in measures.items()
    ]


def eval_results(result: Result) -> dict[str, list[dict[str, Any]]]:
    """What was measured on data sets of the Hub, by file name, as its `.eval_results/*.yaml` have it."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if result.merged is None or not result.dataset:
        return {}
    names = result.dataset.split(", ")
    found: dict[str, list[EvalResultEntry]] = {}
    for place, (task, value) in enumerate(result.merged.per_task.items()):
        name = names[place] if len(names) == len(result.merged.per_task) else names[0]
        if is_repo(name):
            notes = f"accuracy, split {result.split}, {result.merged.samples[task]} samples, the task being known"
            entry = EvalResultEntry(dataset_id=name, task_id=task, value=round(100 * value, 2), notes=notes)
            found.setdefault(f"{name.replace('/', '__')}.yaml", []).append(entry)
    return {file: eval_result_entries_to_yaml(entries) for file, entries in found.items()}


def card_text(
    model: PreTrainedModel, result: Result, recipe: str = "", repo_id: str | None = None, tags: Sequence[str] = ()
) -> str:
    """The whole card, as Markdown with a YAML header: what `result` and the text of a recipe tell of a merged model.

    Args:
        repo_id: where the model will be, if that is known.
        tags: more tags.
    """
    from jinja2 import Environment, StrictUndefined

    template = resources.files("hf_zipit.report").joinpath("templates/card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["cells"] = lambda cells: "| " + " | ".join(map(escaped, cells)) + " |"
    environment.filters["escaped"] = escaped
    polished = PolishReport.of(model)
    text = environment.from_string(template).render(
        metadata=card_metadata(model, result, tags).to_yaml().strip(),
        result=result,
        config=model.config,
        classes={task: list(model.config.labels_of(task).values()) for task in model.config.tasks},
        architecture=model.config.source_architecture,
        main_input=model.main_input_name,
        auto_class=getattr(model, "auto_class", "AutoModel"),
        where=repo_id or f"{SOMEWHERE}{result.name}",
        processor_folders=processor_folders(model),
        recipe=recipe.strip(),
        recipe_sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
        accuracies=accuracies,
        accuracy_words=accuracy_words,
        ends=ends,
        scored=result.scores and score_lines({EXPERTS: result.expert_scores, "**this model**": result.scores}),
        polished=polished,
        rooted=model.config.method.get("rooted"),
        training=polished and TRAININGS.find(polished.kind),
        residues=residue_bytes(model) if model.config.residues or model.config.mixtures else None,
        refit=None if result.changed else RefitReport.of(model),
        refit_picture=REFIT_PICTURE if installed("matplotlib") else None,
        depth_picture=DEPTH_PICTURE if draws_curve(result) else None,
        kept_picture=KEPT_PICTURE if draws_kept(result) else None,
        kept=kept_shares(result),
        best=best_points(result.curve),
        linked=linked,
        marker=MARKER,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def escaped(text: object) -> str:
    """A text of somebody else as one line of Markdown that stands for itself: no tables, code, links or HTML in it."""
    line = " ".join(str(text).split())
    line = re.sub(r"[\\`|\[\]]", r"\\\g<0>", line)
    return line.replace("<", "&lt;").replace(">", "&gt;")


def draws_curve(result: Result) -> bool:
    """Whether there are several depths to draw, and something that draws."""
    measured = [point for point in result.curve if point.accuracy is not None]
    return installed("matplotlib") and result.experts is not None and len({point.depth for point in measured}) > 1


def processor_folders(model: PreTrainedModel) -> dict[str, str]:
    """By task the folder with its own image processor or tokenizer; empty where all tasks have the same."""
    files = getattr(model, "processor_files", dict)()
    names = getattr(model, "branch_names", {})
    return {task: f"{FOLDER}/{key}" for task, key in names.items() if any(f"{FOLDER}/{key}/" in f for f in files)}


def draws_kept(result: Result) -> bool:
    """Whether there is something to compare, and something that draws."""
    return installed("matplotlib") and result.merged is not None and result.experts is not None


def kept_shares(result: Result) -> dict[str, str]:
    """The share of its expert's accuracy that every task keeps, and of all on average; empty where none is known."""
    if result.merged is None or result.experts is None:
        return {}
    beside = result.experts.per_task
    kept = {task: value / beside[task] for task, value in result.merged.per_task.items() if beside.get(task)}
    mean = {"on average": result.merged.mean / result.experts.mean} if result.experts.mean else {}
    return {name: f"{100 * value:.1f} %" for name, value in {**mean, **kept}.items()}


def best_points(curve: Sequence[Measurement], most: int = 3) -> list[Measurement]:
    """The best merges of several, by their mean accuracy; at depth 0 nothing is merged."""
    measured = [point for point in curve if point.accuracy is not None and point.depth != 0]
    return sorted(measured, key=lambda point: (-point.accuracy.mean, point.parameters))[:most]


def linked(source: str | None) -> str:
    """An expert as the card names it: a repo as a link to it."""
    if not source:
        return "made on the spot"
    return f"[{escaped(source)}]({constants.ENDPOINT}/{source})" if is_repo(source) else escaped(source)


@companion("card")
def write_card(
    folder: Path, model: PreTrainedModel, name: str, repo_id: str | None = None, tags: Sequence[str] = ()
) -> Path:
    """Write the card as the folder's README.md, its pictures and the recipe beside it."""
    title = name if repo_id else model.config.method.get("recipe", {}).get("name", name)
    result, recipe = Result.of(model, title), recipe_text(model, title)
    report = None if result.changed else RefitReport.of(model)
    if report and installed("matplotlib"):
        save_picture(refit_picture(report, f"{title}: error of the refit, by module"), folder / REFIT_PICTURE)
    if draws_kept(result):
        save_picture(kept_picture(result.merged, result.experts), folder / KEPT_PICTURE)
    if draws_curve(result):
        save_picture(accuracy_over_depth(result.curve, result.experts, title=title), folder / DEPTH_PICTURE)
    if recipe:
        write_text(folder / RECIPE, recipe)
    for file, entries in eval_results(result).items():
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        write_text(folder / EVAL_RESULTS / file, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
    text = card_text(model, result, recipe, repo_id, tags)
    earlier = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    return write_text(folder / CARD, kept_above(text, earlier))


def text_for_repo(card: str, repo_id: str) -> str:
    """A card that was written before its repo was known, with the repo's id where the model is loaded."""
    return re.sub(re.escape(SOMEWHERE) + r"[\w.-]+", repo_id, card)
