"""From the tasks' outputs to a joint one: pure functions of tensors and model outputs.

Classification: logits side by side, or a vote where the tasks have the same classes. Features: side by side, scaled so
that for contrastive models the cosine similarity of joint embeddings is the mean of the tasks' similarities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import ModelOutput

from ..errors import ZipItError


def vote(logits: Sequence[Tensor], problem_type: str | None = None) -> Tensor:
    """Log of the mean of the tasks' probabilities, each `[..., classes]`; for regression and multi-label the mean."""
    if problem_type in ("regression", "multi_label_classification") or logits[0].shape[-1] == 1:
        return torch.stack(list(logits)).mean(0)
    total = functional.log_softmax(logits[0].float(), dim=-1)
    for other in logits[1:]:  # one after the other: a stack of vocabulary-sized logits would be large
        total = torch.logaddexp(total, functional.log_softmax(other.float(), dim=-1))
    return (total - math.log(len(logits))).to(logits[0].dtype)


def mask_foreign(
    logits: Tensor, sample_tasks: Sequence[str], offsets: Mapping[str, int], widths: Mapping[str, int]
) -> Tensor:
    """Joint logits `[batch, ..., classes]` with the classes of each sample's other tasks at the dtype's minimum."""
    own = torch.zeros(len(sample_tasks), logits.shape[-1], dtype=torch.bool)
    for row, task in enumerate(sample_tasks):
        own[row, offsets[task] : offsets[task] + widths[task]] = True
    own = own.view(len(sample_tasks), *[1] * (logits.dim() - 2), -1).to(logits.device)
    return logits.masked_fill(~own, torch.finfo(logits.dtype).min)


def pick(logits: Mapping[str, Tensor], sample_tasks: Sequence[str]) -> Tensor:
    """Every sample's logits from its own task; all tasks have the same classes."""
    return torch.stack([logits[task][row] for row, task in enumerate(sample_tasks)])


def joint_ids(labels: Tensor, sample_tasks: Sequence[str], offsets: Mapping[str, int]) -> Tensor:
    """The tasks' own label ids `[batch, ...]` as joint ids; negative ones (ignored positions) stay."""
    shift = torch.tensor([offsets[task] for task in sample_tasks], device=labels.device)
    return torch.where(labels >= 0, labels + shift.view(-1, *[1] * (labels.dim() - 1)), labels)


def joint_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """Cross entropy over the joint classes, -100 ignored; or what `problem_type` asks for, as in transformers."""
    labels = labels.to(logits.device)
    if problem_type == "regression":
        return functional.mse_loss(logits.squeeze(-1), labels.view_as(logits.squeeze(-1)).to(logits.dtype))
    if problem_type == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if labels.is_floating_point():
        raise ZipItError(
            "Joint labels are floating point numbers, but the joint loss is over classes: give class ids, or set "
            "config.problem_type to 'regression' or 'multi_label_classification'."
        )
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def side_by_side(
    outputs: Sequence[ModelOutput], axes: Mapping[str, int] | None = None, prefix: str = ""
) -> ModelOutput:
    """One output of the tasks' own type, field by field (`axes`: the axis of units of a field, where it is known)."""
    fields = {}
    for name in outputs[0]:
        values = [output.get(name) for output in outputs]
        fields[name] = join(f"{prefix}{name}", values, axes or {})
    return type(outputs[0])(**fields)


def join(field: str, values: Sequence[Any], axes: Mapping[str, int]) -> Any:
    """The joint value of one field; None for what cannot be joined, such as caches."""
    first, name = values[0], field.rpartition(".")[2]
    if isinstance(first, ModelOutput):
        return side_by_side(values, axes, prefix=f"{field}.")
    if isinstance(first, tuple):
        return tuple(join(field, together, axes) for together in zip(*values, strict=True))
    if not isinstance(first, Tensor):
        return None
    if first.dim() == 0 or name.startswith("logits_per_"):
        return torch.stack(list(values)).mean(0)
    if name.endswith("_embeds"):
        return joint_embedding(values)
    # Feature maps `[batch, channels, height, width]` and attentions `[batch, heads, ...]` have their units on axis 1.
    return torch.cat(list(values), dim=axes.get(field, 1 if first.dim() == 4 else -1))


def joint_embedding(embeddings: Sequence[Tensor]) -> Tensor:
    """Unit vectors `[..., sum of dims]` whose cosine similarities are the means of the tasks' cosine similarities."""
    return torch.cat([functional.normalize(x, dim=-1) for x in embeddings], dim=-1) / math.sqrt(len(embeddings))
