"""Concrete masks: which entries of the merged task vector count, one mask for all tasks (arXiv 2312.06173).

With D what the merge added to the base, W = W_0 + m / mean(m) D entry by entry, where m = sigmoid((x + noise) / t) is
a relaxed mask and x is learnt so that the model is sure of its answers to the tasks' own samples. The noise is
logistic, drawn anew for every step; without it, as here for measuring and for the result, m is what it is at its
middle. All x start from one value, with which nothing is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_zipit.combine.combine import generator_of
from hf_zipit.combine.options import above
from hf_zipit.polish.distance import Entropy
from hf_zipit.polish.kind import Finished, Learnt, register
from hf_zipit.polish.vectors import Trunks


@register(
    "concrete",
    about="a mask of the merged task vector, to be sure of its answers (after Concrete masks, arXiv 2312.06173)",
    loss="entropy of the answers",
    needs_base=True,
)
def concrete(done: Finished, *, temperature: float = 0.5, start: float = 3.0) -> Learnt:
    """The mask.

    Args:
        temperature: t; the lower, the nearer the mask is to 0 and 1.
        start: of every x.

    Raises:
        RecipeError: a temperature that is not above 0, or the model does not choose between classes or tokens.
    """
    above("concrete", "temperature", temperature)
    trunks, seed = Trunks(done), done.planned.config.seed
    logits = {name: nn.Parameter(torch.full_like(p, start)) for name, p in trunks.parameters.items()}
    added = {name: trunks.start[name] - origin for name, origin in trunks.origins.items()}
    steps: list[int | None] = [None]

    def change(name: str) -> Tensor:
        """What is added to the merged tensor."""
        x = logits[name]
        if steps[0] is not None:
            drawn = torch.rand(x.shape, generator=generator_of(seed, f"{steps[0]}/{name}"))
            x = x + drawn.clamp(1e-6, 1 - 1e-6).logit().to(x)
        mask = (x / temperature).sigmoid()
        first = mask.flatten()[:1]
        mean = first + (mask - first).mean()  # of equal numbers that number, to the bit
        return (mask / mean - 1) * added[name]

    @torch.no_grad()
    def put(step: int | None) -> None:
        steps[0] = step
        trunks.put({name: change(name) for name in logits})

    def pull() -> None:
        for name, parameter in trunks.parameters.items():
            if parameter.grad is not None:
                (logits[name].grad,) = torch.autograd.grad(change(name), logits[name], parameter.grad)
                parameter.grad = None

    loss = Entropy(done.merged, done.planned, done.positions, 0.0)
    return Learnt(dict(logits), loss, list(trunks.parameters.values()), put, pull)
