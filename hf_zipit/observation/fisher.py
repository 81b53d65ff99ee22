"""The diagonal of the Fisher information: how much a model's own output would change with every parameter.

The mean over samples x of E_y |d log p(y | x) / d theta|^2, with y drawn from what the model itself predicts, not from
labels: nobody's are needed. What has no classes counts as a normal distribution of unit variance about its value.
*This takes gradients*, one backward pass for every sample; no weight is changed by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_zipit.observation.record import mask_of
from hf_zipit.symmetry.trace import select_outputs


def squared_gradients(
    model: nn.Module,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    fields: Sequence[str] | None,
    generator: torch.Generator,
    samples: int,
) -> dict[str, Tensor]:
    """By name the sum over samples of the squared gradients of drawn log-likelihoods, float64 on the CPU.

    Args:
        model: in eval mode.
        inputs: a batch of so many samples, which come first.
        names: of the parameters.
        fields: the outputs that count, None for all.
        generator: draws the outcomes, on the CPU.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    parameters = [known[name] for name in names]
    before = [parameter.requires_grad for parameter in parameters]
    found = {name: torch.zeros(known[name].shape, dtype=torch.float64) for name in names}
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for i in range(samples):
                one = {n: value[i : i + 1] if isinstance(value, Tensor) else value for n, value in inputs.items()}
                outcome = log_likelihood(select_outputs(model(**one), fields), mask_of(one), generator)
                gradients = torch.autograd.grad(outcome, parameters, allow_unused=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        found[name] += gradient.to("cpu", torch.float64).square()
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
    return found


def log_likelihood(outputs: Mapping[str, Tensor], mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Of an outcome that is drawn from what a model puts out for one sample; padded positions do not count."""
    logits = outputs.get("logits")
    if logits is not None and logits.dim() in (2, 3) and logits.shape[-1] > 1:
        flat = logits.flatten(0, -2).float()
        if mask is not None and logits.shape[:2] == mask.shape:
            flat = flat[mask.bool().flatten().to(flat.device)]
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
        return -functional.cross_entropy(flat, drawn.to(flat.device), reduction="sum")
    noise = [torch.randn(x.shape, generator=generator).to(x) for x in outputs.values()]
    return sum((x * drawn).sum() for x, drawn in zip(outputs.values(), noise, strict=True))  # type: ignore[return-value]
