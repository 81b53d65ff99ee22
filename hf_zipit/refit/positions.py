"""How much every position (token, patch) of a batch counts in the regressions.

Padding counts nothing, and the positions that the head reads count more than the others: an error there reaches the
output undiluted. The adapter says which positions those are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """The rule for one family.

    Attributes:
        text: which text positions the head reads: `first`, `masked`, `end`, `highest` (the one with the highest id) or
            `all`.
        image: the same for image patches: `first` or `all`.
        mask_token: the id of the mask token, for `masked`.
        end_token: the id of the end-of-text token, for `end`.
        weight: how often those positions count.
    """

    text: str = "all"
    image: str = "all"
    mask_token: int | None = None
    end_token: int | None = None
    weight: float = 1.0

    def weights(self, inputs: Mapping[str, Tensor], length: int) -> Tensor | None:
        """Weights `[samples, length]` for a value with `length` positions; None where all count the same."""
        ids = inputs.get("input_ids")
        if ids is not None and ids.shape[1] == length:
            mask = inputs.get("attention_mask")
            weights = torch.ones(ids.shape) if mask is None else (mask > 0).float()
            read = self._read_text(ids)
            return weights if read is None else torch.where(read & (weights > 0), self.weight, weights)
        if self.image == "first" and "pixel_values" in inputs:
            weights = torch.ones(len(inputs["pixel_values"]), length)
            weights[:, 0] = self.weight
            return weights
        return None

    def _read_text(self, ids: Tensor) -> Tensor | None:
        read = torch.zeros(ids.shape, dtype=torch.bool)
        if self.text == "first":
            read[:, 0] = True
        elif self.text == "masked" and self.mask_token is not None:
            read = ids == self.mask_token
        elif self.text == "highest":
            read[torch.arange(len(ids)), ids.argmax(1)] = True
        elif self.text == "end" and self.end_token is not None:
            read[torch.arange(len(ids)), (ids == self.end_token).int().argmax(1)] = True
        else:
            return None
        return read
