"""Empty models: models of the experts' class, one for every task, with that task's labels and nothing tied."""

from __future__ import annotations

import copy
import difflib

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ZipItError
from .configuration import ZipItConfig


def source_class(architecture: str | None) -> type[PreTrainedModel]:
    """The class of that name in `transformers`. Raises ZipItError if there is none, or it is not a model."""
    if not architecture:
        raise ZipItError("The configuration has no source_architecture; name the experts' class in transformers.")
    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        names = {name.lower(): name for name in dir(transformers)}
        close = difflib.get_close_matches(architecture.lower(), names, n=1)
        hint = f"; did you mean '{names[close[0]]}'?" if close else "."
        raise ZipItError(
            f"The source architecture '{architecture}' is not a model of transformers {transformers.__version__}{hint}"
        )
    return found


def empty_model(config: ZipItConfig, task: str) -> PreTrainedModel:
    """A model of the source class with the task's labels; its weights mean nothing, and none are tied.

    Its configuration says of ties what the source's does: some forward passes ask (UMT5 scales what its head reads).
    """
    model = source_class(config.source_architecture)(empty_model_config(config, task))
    if config.output_bias:
        add_output_bias(model)
    _set_ties(model.config, config.source_config)
    return model


def add_output_bias(model: PreTrainedModel) -> None:
    """Give the layer that makes the logits of tokens a bias of zeros."""
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(len(head.weight), dtype=head.weight.dtype, device=head.weight.device))
    model.added_output_bias = True


def has_output_bias(model: nn.Module) -> bool:
    """Whether that layer has a bias which the model's class does not give it: whether `add_output_bias` was here."""
    return getattr(model, "added_output_bias", False)


def empty_model_config(config: ZipItConfig, task: str) -> PreTrainedConfig:
    """The source configuration (a copy) with the task's labels, plain outputs and no tied weights."""
    if config.source_config is None:
        raise ZipItError("The configuration has no source_config; give the experts' configuration.")
    own = copy.deepcopy(config.source_config)
    untie(own)
    own.return_dict = True  # the merged model reads the fields of the branches' outputs
    if labels := config.labels_of(task):
        own.id2label, own.label2id = dict(labels), {name: key for key, name in labels.items()}
        own.num_labels = len(labels)  # Pvt's configuration counts them apart
    if config.problem_type is not None:
        own.problem_type = config.problem_type
    return own


def _set_ties(config: PreTrainedConfig, source: PreTrainedConfig | None) -> None:
    """Have a configuration say of tied weights what another one says."""
    if hasattr(source, "tie_word_embeddings"):
        config.tie_word_embeddings = source.tie_word_embeddings
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            _set_ties(inner, getattr(source, name, None))


def untie(config: PreTrainedConfig) -> None:
    """Heads stay apart from embeddings: one is the branch's, the other the trunk's, and their values differ."""
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            untie(inner)
