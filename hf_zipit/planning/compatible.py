"""Whether experts fit each other: one architecture, the same sizes in everything but the head, finite weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_zipit.errors import ExpertError
from hf_zipit.files.known import without_secrets
from hf_zipit.symmetry.proof import model_tensors

# Not "token_id": the forward pass looks for `pad_token_id` (RoBERTa's positions) and `eos_token_id` (what CLIP pools).
BEHAVIOUR_ONLY = (
    "drop", "initializer", "bos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "forced_",
    "problem_type", "output_", "use_cache", "return_dict", "label", "classifier", "mask", "apply_spec",
    "gradient_checkpointing", "summary", "loss", "tie_",
)  # fmt: skip
"""Parts of the names of configuration fields that experts may differ in: they change training, not the network."""

BOOKKEEPING = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "model_type", "auto_map",
    "finetuning_task", "task_specific_params", "pruned_heads", "_attn_implementation", "logit_scale_init_value",
    "chunk_size_feed_forward", "encoder_stride", "is_decoder", "num_classes",
}  # fmt: skip


CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForTokenClassification")
"""How the names of classes of models end whose outputs are classes of their own."""


SAME_TOKENS = "; vocabulary='union' matches the tokens of different tokenizers by their text"
SAME_DEPTH = "; take experts of one depth, or distil one into the other's depth first"
SAME_WIDTH = "; take experts of one width, or distil one into the other's width first"

ADVICE = {
    "vocab_size": SAME_TOKENS,
    **dict.fromkeys(
        ("hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "depths"), SAME_DEPTH
    ),
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "n_embd", "embed_dim", "intermediate_size"), SAME_WIDTH),
}
"""What can be done, by parts of the names of fields."""


def check_experts(experts: Mapping[str, nn.Module], head: tuple[str, ...] = ()) -> None:
    """Experts must be copies of one architecture in everything but the head, with finite weights.

    Args:
        experts: the models by task.
        head: path prefixes of the task head, whose sizes may differ.

    Raises:
        ExpertError: naming the expert, the configuration field or the tensor, and both values.
    """
    check_classes(experts)
    (first_task, first), *others = experts.items()
    for task, other in others:
        difference = first_difference(_config(first), _config(other))
        if difference:
            field, left, right = difference
            hint = "; their position tables have different lengths" if "position" in field else ""
            if "heads" in field and any(hasattr(model, "merged_task") for model in (first, other)):
                hint = "; to merge a merged model with others, refit it with split_heads off"
            hint = hint or next((advice for part, advice in ADVICE.items() if part in field), "")
            raise ExpertError(
                f"the experts differ in the configuration field {field}: {left!r} for {first_task!r}, {right!r} for "
                f"{task!r}{hint}; experts must have the same architecture and sizes"
            )
        mine, theirs = model_tensors(first), model_tensors(other)
        for name in (*mine, *(n for n in theirs if n not in mine)):
            if _is_in(head, name):
                continue
            left, right = (tuple(t[name].shape) if name in t else "missing" for t in (mine, theirs))
            if left != right:
                raise ExpertError(
                    f"the tensor {name} has shape {left} in the expert {first_task!r} but {right} in {task!r}; "
                    "experts must have the same sizes in everything but the task head"
                )
    for task, model in experts.items():
        check_labels(task, model, head)
        for name, tensor in model_tensors(model).items():
            if tensor.is_floating_point() and tensor.device.type != "meta" and not all_finite(tensor):
                raise ExpertError(
                    f"the tensor {name} of the expert {task!r} holds NaN or infinite values; check its training"
                )


def check_labels(task: str, model: nn.Module, head: tuple[str, ...]) -> None:
    """The classes of a classifier must be named 0, 1, ..., and be as many as its head has; raises ExpertError."""
    if not type(model).__name__.endswith(CLASSIFIERS):
        return
    classes = sorted(class_names(model.config))
    lengths = {len(tensor) for name, tensor in model_tensors(model).items() if _is_in(head, name) and tensor.ndim}
    if classes != list(range(len(classes))) or (lengths and len(classes) not in lengths):
        raise ExpertError(
            f"the configuration of the expert {task!r} names the {len(classes)} classes {classes[:9]} (id2label), but "
            f"its head is {', '.join(head)} of length {sorted(lengths)}; name the classes of the head, from 0"
        )


def class_names(config: PreTrainedConfig) -> dict[int, str]:
    """The names of a classifier's classes; those that transformers gives them where its configuration names none."""
    return dict(config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)})


def _is_in(prefixes: tuple[str, ...], name: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; makes no mask of the tensor's size, for it may be large."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def check_classes(experts: Mapping[str, nn.Module]) -> None:
    """Experts must be of one class; raises ExpertError that names two that are not."""
    (first_task, first), *others = experts.items()
    for task, other in others:
        if type(other) is not type(first):
            raise ExpertError(
                f"the expert {task!r} is a {type(other).__name__}, but {first_task!r} is a {type(first).__name__}; "
                "experts must have the same architecture"
            )


def _config(model: nn.Module) -> dict[str, Any]:
    """A model's configuration; what a plain module holds under that name may be anything."""
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        return without_secrets(config.to_dict())
    return dict(config) if isinstance(config, Mapping) else {}


def first_difference(left: Mapping[str, Any], right: Mapping[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    """The first structural field in which two configurations differ, with both values; dotted where nested."""
    for field in sorted({*left, *right}):
        if field in BOOKKEEPING or any(part in str(field) for part in BEHAVIOUR_ONLY):
            continue
        a, b = left.get(field), right.get(field)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = first_difference(a, b, f"{path}{field}.")
            if inner:
                return inner
        elif a != b:
            return f"{path}{field}", a, b
    return None
