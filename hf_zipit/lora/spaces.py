"""Merging in a small space: updates become small tensors there, any combining rule merges these, and they come back.

The rules are those of full weights (`hf_zipit.combine.rules`), with 0 as the base. What they survey (the share of
TIES) is surveyed over all layers' tensors in the space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_zipit.combine.after import inner
from hf_zipit.combine.combine import generator_of
from hf_zipit.lora.factors import Factors, none_like
from hf_zipit.lora.rule import Given, Updates


class Represented(NamedTuple):
    """The experts' updates of one layer in a space: tensors of one shape, and how one of them comes back."""

    parts: Sequence[Tensor]
    back: Callable[[Tensor], Factors]


def merged_in(
    represent: Callable[[Sequence[Factors]], Represented],
    updates: Updates,
    given: Given,
    own: str,
    combine: str,
    options: Mapping[str, Any] | None,
) -> dict[str, Factors]:
    """The merged update of every layer, combined in a space.

    Args:
        represent: from one layer's updates to the space.
        own: the LoRA rule's name, for errors.
        combine, options: the combining rule, and its options.

    Raises:
        RecipeError: there is no such rule, it reads data, or it has no such options.
    """
    rule, known = inner(own, combine, options, "combine")
    spaces = {name: represent(layer) for name, layer in updates.items()}
    filled = {name: space for name, space in spaces.items() if space.parts[0].numel()}
    whole = rule.survey_of([space.parts for space in filled.values()], known)
    merged = {name: none_like(layer[0]) for name, layer in updates.items()}
    for name, space in filled.items():
        generator = generator_of(given.seed, name)
        base = torch.zeros_like(space.parts[0])
        found = rule.combine(space.parts, (), given, known, base=base, whole=whole, generator=generator)
        merged[name] = space.back(found)
    return merged
