"""The data that a recipe names, divided by task and ready for the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_zipit.data.labels import LABEL_COLUMNS
from hf_zipit.errors import ExpertError
from hf_zipit.hub.processors import FOLDER as PROCESSORS
from hf_zipit.hub.processors import processor_files
from hf_zipit.modeling import ZipItForCausalLM, ZipItForMaskedLM, ZipItModel, ZipItPreTrainedModel, merged_class
from hf_zipit.recipe.sections import Data, Recipe
from hf_zipit.recipe.sources import choose_classes, is_ready, load_source, match_labels, part_of, ready, some_of
from hf_zipit.running.experts import entry_of

if TYPE_CHECKING:
    from datasets import Dataset


def recipe_data(recipe: Recipe, data: Data, experts: Mapping[str, PreTrainedModel]) -> dict[str, Dataset]:
    """For every task its own part of its data, with the expert's own label ids, ready for the experts.

    Experts without classes of their own (features, a vocabulary) take whatever samples their task's data has.
    """
    parts = {}
    for task, expert in experts.items():
        entry = entry_of(recipe, task)
        labels = [expert.config.id2label[i] for i in range(expert.config.num_labels)] if has_classes(expert) else None
        processor = partial(load_processor, entry.model)
        parts[task] = _part(data.of(entry), task, labels, entry.classes, processor, expert.config, recipe.seed)
    return parts


def merged_task_data(
    model: ZipItPreTrainedModel, source: str, data: Data, tasks: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """For every task (or those that are named) of a merged model its own part of a data set, classes matched by name.

    Models without classes of their own (features, a vocabulary) take all of it for every task. The processor is the
    one beside the model, in `source`.
    """
    parts = {}
    for task in [model.known(task) for task in tasks or model.config.tasks]:
        labels = list(model.config.labels_of(task).values()) or None
        processor = partial(load_processor, source, model.branch_names[task])
        parts[task] = _part(data, task, labels, (), processor, model.config.source_config)
    return parts


def _part(
    data: Data, task: str, labels: list[str] | None, classes: Sequence[int | str], processor: Callable[[], Any],
    config: PreTrainedConfig, seed: int = 0,
) -> Dataset:  # fmt: skip
    """The rows of a task's classes with the expert's own label ids (all rows without `labels`), ready for it.

    Args:
        labels: the names of the expert's classes, by its label ids.
        classes: what the data calls them, where it names them otherwise.
        processor: loads what prepares raw images or texts.
        config: the expert's.
    """
    whole = load_source(
        data.dataset, data.split, folder=data.folder, config=data.config, columns=data.columns,
        streaming=data.streaming, labelled=labels is not None,
    )  # fmt: skip
    if labels is None:
        part = some_of(whole, data.samples, seed)
    else:
        ids = choose_classes(whole, classes, task) if classes else match_labels(whole, labels, task)
        if len(ids) != len(labels):
            raise ExpertError(
                f"The expert {task!r} has {len(labels)} labels, but experts.{task}.classes names {len(ids)}."
            )
        part = part_of(whole, ids, labels, samples=data.samples, seed=seed)
    return ready(part, None if is_ready(part) else processor(), getattr(config, "num_channels", None))


def has_classes(expert: PreTrainedModel) -> bool:
    """Whether an expert is a classifier, so that data have to be matched to its labels."""
    return merged_class(type(expert).__name__) not in (ZipItModel, ZipItForMaskedLM, ZipItForCausalLM)


def without_labels(data: Dataset) -> Dataset:
    return data.remove_columns([name for name in LABEL_COLUMNS if name in data.column_names])


def load_processor(source: str | None, task: str | None = None) -> Any:
    """The processor, image processor or tokenizer that was saved with a model; None if there is none.

    `task` is the module name of a task of a merged model whose tasks have processors of their own.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    files = processor_files(source, fetch=True)
    if not files:  # without this, a tokenizer would be made of a configuration alone
        return None
    own = f"{PROCESSORS}/{task}"
    where = {"subfolder": own} if any(name.startswith(f"{own}/") for name in files) else {}
    for auto in (AutoProcessor, AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(source, trust_remote_code=False, **where)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):  # each family in its own way
            continue
    return None
