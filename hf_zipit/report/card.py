"""The model card: what was merged and how, how good it is, how to use it; with metadata that the Hub understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zipit.evaluation import Accuracy
from hf_zipit.files import write_text
from hf_zipit.refit import RefitReport
from hf_zipit.report.plots import refit_errors
from hf_zipit.report.tables import accuracies

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from transformers import PreTrainedModel

PIPELINES = {
    "ZipItForImageClassification": "image-classification",
    "ZipItForSequenceClassification": "text-classification",
    "ZipItForTokenClassification": "token-classification",
    "ZipItForMaskedLM": "fill-mask",
    "ZipItModel": "feature-extraction",
}
"""The Hub's task of every merged class."""


REFIT_PICTURE = "refit_errors.png"


@dataclass(frozen=True)
class Result:
    """What a card tells beside what the model knows itself.

    Attributes:
        name: of the merged model.
        base_models: by task the expert's repo id or folder; None for one that was trained on the spot.
        dataset: what was measured on, and its `split`.
        merged: the merged model's accuracies, if measured.
        experts: those of the experts side by side.
        parameters: of the merged model.
        expert_parameters: of all experts together.
    """

    name: str
    base_models: Mapping[str, str | None]
    dataset: str | None = None
    split: str | None = None
    merged: Accuracy | None = None
    experts: Accuracy | None = None
    parameters: int = 0
    expert_parameters: int = 0


def card_metadata(model: PreTrainedModel, result: Result) -> ModelCardData:
    """The card's YAML header. Folders are no base models: the Hub would look for a repo of that name."""
    from huggingface_hub import ModelCardData

    repos = [source for source in result.base_models.values() if source and is_repo(source)]
    return ModelCardData(
        base_model=repos or None,
        base_model_relation="merge" if repos else None,
        datasets=[result.dataset] if result.dataset and "/" in result.dataset else None,
        eval_results=_eval_results(model, result) or None,
        library_name="hf_zipit",
        model_name=result.name,
        pipeline_tag=PIPELINES.get(type(model).__name__),
        tags=["merge", "model-merging", "multi-task", "zipit", model.config.source_config.model_type],
    )


def is_repo(source: str) -> bool:
    """Whether a model's source is a repo id and no folder."""
    return not Path(source).expanduser().exists() and not source.startswith((".", "/", "~")) and source.count("/") <= 1


def _eval_results(model: PreTrainedModel, result: Result) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    if result.merged is None or result.dataset is None:
        return []
    pipeline = PIPELINES.get(type(model).__name__, "other")
    measures = {f"accuracy on {task}": value for task, value in result.merged.per_task.items()}
    if result.merged.joint is not None:
        measures["joint accuracy"] = result.merged.joint
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=result.dataset,
            dataset_name=result.dataset,
            dataset_split=result.split,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(value, 5),
        )
        for name, value in measures.items()
    ]


def card_text(model: PreTrainedModel, result: Result, recipe: str = "") -> str:
    """The whole card, as Markdown with a YAML header. For a refitted model it shows the picture `REFIT_PICTURE`."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("hf_zipit.report").joinpath("templates/card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["cells"] = lambda cells: (
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    )
    return environment.from_string(template).render(
        metadata=card_metadata(model, result).to_yaml().strip(),
        result=result,
        config=model.config,
        classes=_classes(model),
        architecture=model.config.source_architecture,
        main_input=model.main_input_name,
        auto_class="AutoModel" + type(model).__name__.removeprefix("ZipIt").removeprefix("Model"),
        recipe=recipe.strip(),
        accuracies=accuracies,
        refit=RefitReport.of(model),
        picture=REFIT_PICTURE,
    )


def _classes(model: PreTrainedModel) -> dict[str, list[str]]:
    config: Any = model.config
    return {task: list(config.labels_of(task).values()) for task in config.tasks}


def write_card(folder: str | Path, model: PreTrainedModel, result: Result, recipe: str = "") -> Path:
    """Write the card as the folder's README.md, and the recipe and the picture of the refit's errors beside it."""
    if report := RefitReport.of(model):
        refit_errors(report, Path(folder) / REFIT_PICTURE, f"{result.name}: where the refit stays off the experts")
    if recipe:
        write_text(Path(folder) / "recipe.yaml", recipe)
    return write_text(Path(folder) / "README.md", card_text(model, result, recipe))
