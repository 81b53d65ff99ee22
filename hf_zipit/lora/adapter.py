"""A LoRA adapter as what it holds: the updates of layers as factors, and the modules that it keeps whole.

It is read from its own file, or out of a `PeftModel`; no base is loaded for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from hf_zipit.errors import ExpertError
from hf_zipit.experts.adapted import ADAPTER, adapter_config, is_adapted
from hf_zipit.experts.loading import Expert
from hf_zipit.extras import require
from hf_zipit.files.places import folder_of
from hf_zipit.hub.cache import taken_apart
from hf_zipit.hub.reasons import told
from hf_zipit.lora.factors import Factors

PREFIX = "base_model.model."
"""Of every tensor's name in an adapter's file."""

FORMS = {"embedding": (".lora_embedding_A", ".lora_embedding_B"), "layer": (".lora_A.weight", ".lora_B.weight")}
"""By kind of layer what the factors' names end with."""

PLAIN = {"use_dora": "DoRA", "lora_bias": "LoRA with biases", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
         "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow", "velora_config": "VeLoRA",
         "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA", "target_parameters": "LoRA of parameters",
         "layer_replication": "LoRA with replicated layers", "trainable_token_indices": "LoRA with trained tokens",
         "megatron_config": "Megatron's LoRA"}  # fmt: skip
"""Settings of adapters that are more than B A beside the base's weights, and what they are called."""

OTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
"""Initialisations that change the base's own weights."""


class Form(NamedTuple):
    """How a layer's factors are stored: of which kind, and the shape of A behind its rank."""

    kind: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class LoraAdapter:
    """What one adapter holds.

    Attributes:
        task: its name; `source`: where it is from, as it was given.
        config: its settings, as in `adapter_config.json`.
        updates: by layer the scaled factors; `forms`: how they are stored.
        kept: tensors of modules that it keeps whole (`modules_to_save`), by their names in the base.
    """

    task: str
    source: Expert
    config: Mapping[str, Any]
    updates: Mapping[str, Factors]
    forms: Mapping[str, Form]
    kept: Mapping[str, Tensor]

    @property
    def base(self) -> str | None:
        """The base's name, where there is one."""
        return self.config.get("base_model_name_or_path") or None


def read_adapter(task: str, source: Expert) -> LoraAdapter:
    """An adapter from a folder, a repo id or a `PeftModel`, whose active adapter is read.

    Raises:
        ExpertError: it is none, or one of another kind than plain LoRA.
    """
    require("peft")
    config, tensors = _loaded(task, source) if isinstance(source, nn.Module) else _stored(task, str(source))
    _check_kind(task, config)
    updates, forms = {}, {}
    for kind, (first, second) in FORMS.items():
        for name in [name for name in tensors if name.endswith(first)]:
            layer = name.removesuffix(first)
            if layer + second not in tensors:
                raise ExpertError(f"the adapter {task!r} has {name}, but no {layer + second}; save it again")
            a, b = tensors.pop(name), tensors.pop(layer + second)
            forms[layer] = Form(kind, tuple(a.shape[1:]))
            scale = _scale(config, layer, len(a))
            updates[layer] = Factors(scale * b.double().flatten(1), a.double().flatten(1))
            if b.shape[1] != len(a):
                raise ExpertError(f"{layer} of the adapter {task!r} is a grouped convolution; {_INSTEAD}")
    if not updates:
        raise ExpertError(f"the adapter {task!r} holds no LoRA factors; give a LoRA adapter of PEFT")
    whole = tuple(config.get("modules_to_save") or ())
    for name in tensors:
        if not any(f".{module}." in f".{name}" for module in whole):
            raise ExpertError(
                f"the adapter {task!r} holds {name}, which is neither a LoRA factor nor of its modules_to_save; "
                f"{_INSTEAD}"
            )
    return LoraAdapter(task, source, config, updates, forms, tensors)


_INSTEAD = "hf_zipit.merge merges such adapters as the full models that they make of their base"


def _check_kind(task: str, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type"))
    found = next((called for setting, called in PLAIN.items() if config.get(setting)), None)
    start = str(config.get("init_lora_weights")).lower()
    if kind != "LORA":
        found = kind
    elif start.startswith(OTHER_BASE):
        found = f"LoRA that starts from {start}"
    elif found is None and config.get("bias", "none") != "none":
        found = "LoRA with trained biases"
    if found is not None:
        raise ExpertError(
            f"the adapter {task!r} is of the kind {found}, which is no pair of factors alone; {_INSTEAD}"
        )


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (arXiv 2312.03732)."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _loaded(task: str, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not is_adapted(model):
        raise ExpertError(
            f"the adapter {task!r} is a {type(model).__name__}; give a folder, a repo id or a PeftModel, or merge "
            "full models with hf_zipit.merge"
        )
    from peft import get_peft_model_state_dict

    config = model.peft_config[model.active_adapter].to_dict()
    config["peft_type"] = getattr(config["peft_type"], "value", config["peft_type"])
    _check_kind(task, config)  # what is of another kind has other tensors
    # "auto" would look the base up on the Hub.
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return config, {name.removeprefix(PREFIX): tensor.detach().cpu() for name, tensor in tensors.items()}


def _stored(task: str, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    source, revision, _ = (str(folder), None, None) if (folder := folder_of(source)) else taken_apart(source)
    with told(f"the adapter {task!r} could not be loaded from {source}", source, revision):
        config = adapter_config(source, revision)
        if config is None:
            raise ExpertError(
                f"the adapter {task!r} ({source}) has no adapter_config.json; give an adapter of PEFT, or merge full "
                "models with hf_zipit.merge"
            )
        _check_kind(task, config)
        found = cached_file(source, ADAPTER, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise ExpertError(
            f"the adapter {task!r} ({source}) has no {ADAPTER}; other weights are not read, for a pickle can run "
            "code: save it again"
        )
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in load_file(Path(found)).items()}
