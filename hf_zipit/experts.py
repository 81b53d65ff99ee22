"""The experts: loaded where they are given by name, and checked against each other before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_zipit import modeling
from hf_zipit.adapted import adapter_config, is_adapted, load_adapted, plain
from hf_zipit.cache import commit_of
from hf_zipit.errors import ExpertError, ZipItError
from hf_zipit.hub_errors import why
from hf_zipit.modeling import ZipItConfig, ZipItPreTrainedModel
from hf_zipit.processors import processor_files
from hf_zipit.symmetry.proof import model_tensors

Expert = PreTrainedModel | nn.Module | str | Path
Experts = Mapping[str, Expert] | Iterable[tuple[str, Expert]]

# Not "token_id": the forward pass looks for `pad_token_id` (RoBERTa's positions) and `eos_token_id` (what CLIP pools).
BEHAVIOUR_ONLY = (
    "drop", "initializer", "bos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "problem_type",
    "output_", "use_cache", "return_dict", "label", "classifier", "mask", "apply_spec", "gradient_checkpointing",
    "summary", "loss", "tie_",
)  # fmt: skip
"""Parts of the names of configuration fields that experts may differ in: they change training, not the network."""

BOOKKEEPING = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "model_type", "auto_map",
    "finetuning_task", "task_specific_params", "pruned_heads", "_attn_implementation", "logit_scale_init_value",
    "chunk_size_feed_forward", "encoder_stride", "is_decoder",
}  # fmt: skip


def load_experts(experts: Experts, *, revisions: Mapping[str, str] | None = None) -> dict[str, PreTrainedModel]:
    """The experts by task name: repo ids and folders loaded in float32 and eval mode, models as they are.

    A LoRA adapter becomes the model that it makes of its base. A merged model becomes several experts, one for each of
    its tasks, named `NAME/TASK`.

    Raises:
        ExpertError: for fewer than two experts, an empty or repeated task name, or a model that cannot be loaded.
    """
    pairs = list(experts.items() if isinstance(experts, Mapping) else experts)
    names = [name for name, _ in pairs]
    if not pairs:
        raise ExpertError("merging needs at least two experts, but none was given")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ExpertError(f"the task name {name!r} is empty; give every expert the name of its task")
        if names.count(name) > 1:
            count = names.count(name)
            raise ExpertError(f"the task name {name!r} is given to {count} experts; task names must differ")
    found: dict[str, PreTrainedModel] = {}
    for name, expert in pairs:
        loaded = load_expert(name, expert, (revisions or {}).get(name))
        parts = by_task(name, loaded) if isinstance(loaded, ZipItPreTrainedModel) else {name: loaded}
        if twice := next((task for task in parts if task in found), None):
            raise ExpertError(f"the task name {twice!r} is given to 2 experts; task names must differ")
        found |= parts
    if len(found) < 2:
        raise ExpertError(f"merging needs at least two experts, but only {names[0]!r} was given")
    return found


def by_task(name: str, merged: ZipItPreTrainedModel) -> dict[str, PreTrainedModel]:
    """The tasks of a merged model as experts of their own, `NAME/TASK`.

    Raises:
        ExpertError: if a task cannot be a plain model.
    """
    try:
        return {f"{name}/{task}": merged.expert(task) for task in merged.config.tasks}
    except ExpertError as error:
        raise ExpertError(f"the expert {name!r} is a merged model that cannot be merged again: {error}") from error


def load_expert(task: str, expert: Expert, revision: str | None = None) -> PreTrainedModel:
    """One expert; a repo id or a folder is loaded in float32 with the class that its configuration names.

    With a repo id its image processor or tokenizer and its card come along into the cache, for the merged model's.

    Raises:
        ExpertError: if it cannot be loaded, in one sentence that says why.
    """
    if isinstance(expert, nn.Module):
        return as_expert(task, expert)
    source = str(expert)
    looks_local = isinstance(expert, Path) or source.startswith((".", "/", "~"))
    folder = Path(source).expanduser()
    if looks_local and not folder.is_dir():
        raise ExpertError(f"the expert {task!r} is to come from the folder {source}, which does not exist")
    source = str(folder) if folder.is_dir() else source
    try:
        settings = adapter_config(source, revision)
        model = load_adapted(task, source, settings, revision) if settings else _load(task, source, revision)
    except (OSError, ValueError, RuntimeError, HTTPError, SafetensorError) as error:
        if isinstance(error, ZipItError):
            raise
        reason = why(error, source, revision)
        raise ExpertError(f"the expert {task!r} could not be loaded from {source}: {reason}") from error
    if not folder.is_dir():
        commit = commit_of(source, revision or "main")
        processor_files(source, commit, fetch=True)
        model.config._commit_hash = commit
    return model.eval()


def as_expert(task: str, model: nn.Module) -> PreTrainedModel:
    """A loaded model as an expert: itself, or what an adapter makes of its base."""
    if is_adapted(model):
        return plain(task, model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExpertError(
            f"the expert {task!r} carries adapters beside its weights; give the adapter's folder or repo id instead, "
            "or a PeftModel"
        )
    return model  # type: ignore[return-value]


def _load(task: str, source: str, revision: str | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source, revision=revision)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(modeling if isinstance(config, ZipItConfig) else transformers, architecture, None)
    if model_class is None:
        raise ExpertError(
            f"the configuration of the expert {task!r} ({source}) names the class {architecture or 'nothing'!r}, "
            "which transformers does not have; load the model yourself and pass it"
        )
    return model_class.from_pretrained(source, config=config, revision=revision, dtype=torch.float32)


def check_experts(experts: Mapping[str, nn.Module], head: tuple[str, ...] = ()) -> None:
    """Experts must be copies of one architecture in everything but the head, with finite weights.

    Args:
        experts: the models by task.
        head: path prefixes of the task head, whose sizes may differ.

    Raises:
        ExpertError: naming the expert, the configuration field or the tensor, and both values.
    """
    (first_task, first), *others = experts.items()
    for task, other in others:
        if type(other) is not type(first):
            raise ExpertError(
                f"the expert {task!r} is a {type(other).__name__}, but {first_task!r} is a {type(first).__name__}; "
                "experts must have the same architecture"
            )
        difference = first_difference(_config(first), _config(other))
        if difference:
            field, left, right = difference
            hint = "; their position tables have different lengths" if "position" in field else ""
            raise ExpertError(
                f"the experts differ in the configuration field {field}: {left!r} for {first_task!r}, {right!r} for "
                f"{task!r}{hint}; experts must have the same architecture and sizes"
            )
        mine, theirs = model_tensors(first), model_tensors(other)
        for name in (*mine, *(n for n in theirs if n not in mine)):
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in head):
                continue
            left, right = (tuple(t[name].shape) if name in t else "missing" for t in (mine, theirs))
            if left != right:
                raise ExpertError(
                    f"the tensor {name} has shape {left} in the expert {first_task!r} but {right} in {task!r}; "
                    "experts must have the same sizes in everything but the task head"
                )
    for task, model in experts.items():
        for name, tensor in model_tensors(model).items():
            if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
                raise ExpertError(
                    f"the tensor {name} of the expert {task!r} holds NaN or infinite values; check its training"
                )


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if config is not None else {}


def first_difference(left: Mapping[str, Any], right: Mapping[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    """The first structural field in which two configurations differ, with both values; dotted where nested."""
    for field in sorted({*left, *right}):
        if field in BOOKKEEPING or any(part in field for part in BEHAVIOUR_ONLY):
            continue
        a, b = left.get(field), right.get(field)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = first_difference(a, b, f"{path}{field}.")
            if inner:
                return inner
        elif a != b:
            return f"{path}{field}", a, b
    return None
