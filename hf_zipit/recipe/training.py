"""Training a small expert inside a recipe, so that a demonstration needs no download. Not a training library.

A classifier of any family is made from its configuration and trained with AdamW under a one-cycle schedule.

Invariants: the seed alone decides the initialisation and the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_zipit.errors import RecipeError
from hf_zipit.registry import suggestion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Training:
    """How experts are trained.

    Attributes:
        model: the configuration's fields, with `model_type` (`vit`, `resnet`, ...).
        epochs: passes over the data.
        learning_rate: the largest one of the cycle.
        batch_size: samples a step.
        weight_decay: of AdamW.
    """

    model: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    learning_rate: float = 2e-3
    batch_size: int = 32
    weight_decay: float = 0.05


def new_classifier(model: dict[str, Any], labels: list[str], seed: int) -> PreTrainedModel:
    """A randomly initialised image classifier for `labels`.

    Raises RecipeError if the configuration is not that of an image classifier.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    fields = dict(model)
    model_type = fields.pop("model_type", None)
    names = dict(enumerate(labels))
    if model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        hint = suggestion(model_type, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
        raise RecipeError(f"train.model makes no image classifier of model_type {model_type!r}; {hint}")
    try:
        config = AutoConfig.for_model(
            model_type, **fields, id2label=names, label2id={name: key for key, name in names.items()}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForImageClassification.from_config(config)
    except Exception as error:  # transformers raises many kinds for a configuration that does not work
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(f"train.model makes no image classifier of model_type {model_type!r}: {first}") from error


def train_classifier(training: Training, data: Dataset, labels: list[str], *, seed: int) -> PreTrainedModel:
    """A classifier trained on `pixel_values` and `labels`, in eval mode, on the CPU.

    Args:
        data: rows with `pixel_values [channels, height, width]` and `labels`, ids into `labels`.
        seed: of the initialisation and of the order.
    """
    import torch
    from accelerate import PartialState
    from torch.nn.functional import cross_entropy

    model = new_classifier(training.model, labels, seed)
    device = PartialState().device
    columns = data.with_format("torch")[:]
    images, targets = columns["pixel_values"].to(device), columns["labels"].to(device)
    order = torch.Generator().manual_seed(seed)
    steps = training.epochs * -(-len(targets) // training.batch_size)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=steps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        for _ in range(training.epochs):
            for rows in torch.randperm(len(targets), generator=order).split(training.batch_size):
                loss = cross_entropy(model(pixel_values=images[rows]).logits, targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.cpu().eval()
