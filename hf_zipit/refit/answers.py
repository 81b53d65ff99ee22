"""What a model answers, and how far two models' answers are apart.

Distributions over classes or tokens are apart by the Kullback-Leibler divergence; everything else by the squared error
over the expert's variance, which has no unit and is 0 for a perfect copy and 1 for a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def kind_of(name: str, value: Tensor, model: nn.Module) -> str:
    """What an output field holds: a `"choice"` among classes, several `"labels"`, or `"values"`."""
    problem = getattr(model.config, "problem_type", None)
    if "logits" not in name or problem == "regression" or classes_last(value).shape[-1] == 1:
        return "values"
    return "labels" if problem == "multi_label_classification" else "choice"


def classes_last(logits: Tensor) -> Tensor:
    """`[..., classes]`, of logits whose classes come last or, for maps `[samples, classes, height, width]`, first."""
    return logits.movedim(1, -1) if logits.dim() == 4 else logits


def divergence(found: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """How far answers `[..., classes]` are from those that are wanted, `[...]`: in nats, or squared."""
    if kind == "values":
        return (found - wanted).square().sum(-1)
    if kind == "labels":  # each class on its own
        soft = wanted.sigmoid()
        surprise = functional.binary_cross_entropy_with_logits(found, soft, reduction="none")
        least = functional.binary_cross_entropy_with_logits(wanted, soft, reduction="none")
        return (surprise - least).sum(-1)
    log_p, log_q = found.log_softmax(-1), wanted.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def statistics(answers: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Of answers `[..., classes]` what their mean is taken of, and what `spread_of` needs the mean of, `[...]`."""
    if kind == "values":
        return answers, answers.square().sum(-1)
    likely = answers.sigmoid() if kind == "labels" else answers.softmax(-1)
    return likely, _entropy(likely, kind)


def entropy_of(answers: Tensor, kind: str) -> Tensor:
    """How unsure answers `[..., classes]` are, `[...]`, in nats."""
    return _entropy(answers.sigmoid() if kind == "labels" else answers.softmax(-1), kind)


def spread_of(middle: Tensor, own: Tensor, kind: str) -> Tensor:
    """How far the best constant answer is off on average, from the means of both `statistics`."""
    return own - middle.square().sum() if kind == "values" else _entropy(middle, kind) - own


def _entropy(likely: Tensor, kind: str) -> Tensor:
    found = torch.special.entr(likely)
    return (found + torch.special.entr(1 - likely) if kind == "labels" else found).sum(-1)


def mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of rows, weighted where they have weights."""
    return rows.mean() if weights is None else (rows * weights).sum() / weights.sum().clamp_min(1e-12)


def spread_error(found: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    """The mean squared error over the variance of what is wanted."""
    found, wanted = found.float(), wanted.float()
    squares = ((found - wanted).square(), (wanted - wanted.mean()).square())
    off, spread = (mean(x.mean(-1) if weights is not None else x, weights) for x in squares)
    return off / spread.clamp_min(1e-12)
