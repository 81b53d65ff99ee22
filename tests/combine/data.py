"""Drawn data for rules that read some: what a layer is fed by task, and how important its weights are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zipit.combine.layers import Layer

ROWS = 40


@dataclass(frozen=True)
class Data:
    """By task the merged model's inputs x and the expert's z, `[rows, in]`, and the Fisher diagonal, `[out, in]`."""

    x: list[Tensor]
    z: list[Tensor]
    fisher: list[Tensor]

    @classmethod
    def draw(cls, count: int, outputs: int, inputs: int, seed: int = 3) -> Data:
        generator = torch.Generator().manual_seed(seed)

        def some(*shape: int) -> list[Tensor]:
            return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]

        mixed = [rows @ mix + 0.5 for rows, mix in zip(some(ROWS, inputs), some(inputs, inputs), strict=True)]
        near = [rows + 0.3 * more for rows, more in zip(mixed, some(ROWS, inputs), strict=True)]
        return cls(mixed, near, [own.square() for own in some(outputs, inputs)])

    def reversed(self) -> Data:
        return Data(self.x[::-1], self.z[::-1], self.fisher[::-1])

    def reordered(self, rows: Tensor, columns: Tensor) -> Data:
        own = [part[:, columns] for part in self.x], [part[:, columns] for part in self.z]
        return Data(*own, [part[rows][:, columns] for part in self.fisher])

    def agreeing(self) -> Data:
        """What is there where all models compute the same."""
        return Data(self.x, self.x, self.fisher)

    @property
    def grams(self) -> list[Tensor]:
        """E[z z^T]."""
        return [rows.T @ rows / len(rows) for rows in self.z]

    def layer(self, weights: list[Tensor], biases: list[Tensor] | None = None, norm: bool = False) -> Layer:
        """Of a matrix or, where there is a scale for every input, of a norm."""

        def moments(one: list[Tensor], two: list[Tensor]) -> list[Tensor]:
            found = [a.T @ b / len(a) for a, b in zip(one, two, strict=True)]
            return [part.diagonal() for part in found] if norm else found

        means = [[part.mean(0) for part in rows] for rows in (self.x, self.z)]
        return Layer(moments(self.x, self.x), moments(self.x, self.z), *means, weights, biases)

    def given(self, weights: list[Tensor]) -> dict[str, object]:
        """What a rule is given of it, whichever it wants."""
        return {"grams": self.grams, "fisher": self.fisher, "layer": self.layer(weights)}
