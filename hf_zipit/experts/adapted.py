"""Experts that are adapters: LoRA weights on a base model, which become a plain model before they are merged.

An adapter is not a network of its own, so its update is added to the base first (`merge_and_unload`; LoRA,
arXiv:2106.09685), and modules that were trained beside it (`modules_to_save`, mostly the classifier) take the place of
the base's. What comes out is an expert like any other.

Invariants: the expert computes what the adapted model computes, and a model that the user passed stays as it is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_zipit.errors import ExpertError
from hf_zipit.experts.checkpoints import class_of, read_config, read_weights
from hf_zipit.files.places import folder_of
from hf_zipit.hub.reasons import told

ADAPTER = "adapter_model.safetensors"

HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The Auto class of PEFT's task types; an adapter for images names its base's class itself."""


def is_adapted(model: nn.Module) -> bool:
    """Whether a loaded model is one of PEFT's."""
    return type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "peft_config")


def adapter_config(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """The configuration of the adapter in a folder or repo; None where there is no adapter."""
    found = find_adapter_config_file(source, revision=revision)
    if not found:
        return None
    settings = json.loads(Path(found).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ExpertError(f"the adapter_config.json of {source} holds no mapping of settings; save the adapter again")
    return settings


def plain(task: str, model: nn.Module) -> PreTrainedModel:
    """The plain model that a `PeftModel` computes; a copy, for PEFT takes its own apart.

    Raises ExpertError for adapters that cannot become weights of the base, such as prompts.
    """
    return _merged(task, copy.deepcopy(model), "")  # a PeftModel does not know where its adapter came from


def load_adapted(task: str, source: str, settings: dict[str, Any], revision: str | None = None) -> PreTrainedModel:
    """An adapter from a folder or repo, merged into its base, in float32; `settings` is what `adapter_config` found.

    Raises ExpertError if PEFT is not installed, the base's class is unknown, or the adapter cannot become weights.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ExpertError(
            f"the expert {task!r} ({source}) is an adapter, and PEFT is not installed; install it with "
            "`pip install 'hf-zipit[peft]'`"
        ) from error
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # what this version of PEFT knows

    if (kind := settings.get("peft_type")) not in [each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ExpertError(
            f"the adapter of the expert {task!r} ({source}) has the peft_type {kind!r}, which the installed PEFT does "
            "not have; update PEFT, or give an adapter such as LoRA"
        )
    base_source = settings.get("base_model_name_or_path")
    if not base_source or not isinstance(base_source, str):
        raise ExpertError(f"the adapter of the expert {task!r} ({source}) names no base model; merge it first")
    saved = _saved_shapes(task, source, revision)
    what = f"the base {base_source} of the expert {task!r} could not be loaded"
    with told(what, base_source, settings.get("revision")):
        base = _load_base(task, source, settings, saved)
    model = PeftModel.from_pretrained(base, source, **({"revision": revision} if revision else {}))
    return _merged(task, model, source)


def _load_base(task: str, source: str, settings: dict[str, Any], saved: Mapping[str, list[int]]) -> PreTrainedModel:
    """The base, with a head of the adapter's size."""
    base_source, base_revision = settings["base_model_name_or_path"], settings.get("revision")
    own = read_config(base_source, base_revision)
    model_class = base_class(task, settings, own)
    labelled = _labelled(model_class, own, source, saved)
    # The base's classifier may have another size: the adapter brings its own.
    base, report = read_weights(model_class, base_source, labelled, base_revision, dtype=torch.float32)
    drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])} - saved.keys()
    if drawn:
        raise ExpertError(
            f"the tensor {min(drawn)} of the expert {task!r} is neither in the adapter {source} nor in its base "
            f"{base_source}; save it with the adapter (modules_to_save)"
        )
    return base


def base_class(task: str, settings: Mapping[str, Any], config: PreTrainedConfig) -> Any:
    """The class of the base with the head that the adapter was trained for, or an Auto class that finds it."""
    mapping = settings.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if not named and (auto := HEADS.get(str(settings.get("task_type")))):
        return getattr(transformers, auto)
    return class_of(config, f"the {'adapter' if named else 'base'} of the expert {task!r}", named=named)


def _labelled(
    model_class: Any, config: PreTrainedConfig, source: str, saved: Mapping[str, list[int]]
) -> PreTrainedConfig:
    """The base's configuration with the adapter's labels: from a configuration saved beside it, else their number.

    An adapter does not say how many labels its classifier has. So the classifier's shape in the base is compared with
    that in the adapter's file.
    """
    beside = (folder_of(source) or Path("none")) / "config.json"
    content = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    if labels := content.get("id2label") if isinstance(content, dict) else None:
        if not isinstance(labels, dict) or not all(key.isdecimal() for key in labels):
            raise ExpertError(f"the id2label in {beside} does not name labels by number; save the adapter again")
        config.id2label = {int(key): name for key, name in labels.items()}
        config.label2id = {name: key for key, name in config.id2label.items()}
        return config
    with torch.device("meta"):
        empty = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    for name, tensor in empty.state_dict().items():
        shape = saved.get(name)
        if shape and tensor.dim() and shape[0] != tensor.shape[0] == config.num_labels:
            config.num_labels = shape[0]
            break
    return config


def _saved_shapes(task: str, source: str, revision: str | None) -> dict[str, list[int]]:
    """Shapes of the tensors in an adapter's file, by their names in the base model."""
    found = cached_file(source, ADAPTER, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise ExpertError(
            f"the adapter of the expert {task!r} ({source}) has no {ADAPTER}; other weights are not read, for a "
            "pickle can run code: save it again"
        )
    with safe_open(found, "pt") as file:
        return {name.removeprefix("base_model.model."): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _merged(task: str, model: nn.Module, source: str) -> PreTrainedModel:
    if not hasattr(model, "merge_and_unload") or not hasattr(model.base_model, "merge_and_unload"):
        kind = str(model.peft_config[model.active_adapter].peft_type).rpartition(".")[2]
        raise ExpertError(
            f"the adapter of the expert {task!r} ({kind}) does not change weights, so it cannot be merged into its "
            "base; merging takes adapters such as LoRA"
        )
    merged = model.merge_and_unload(safe_merge=True)
    merged.name_or_path = source
    merged.config._commit_hash = None  # the base's
    return merged.eval().requires_grad_(True)
