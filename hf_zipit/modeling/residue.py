"""What a kind of residue is: a packed tensor of one task, and how it is made of what the task's own tensor is.

A kind is one file of `kinds/`: a class that packs (`pack`, or step by step) and unpacks (`tensor`), registered by its
name. It knows tensors alone, nothing of plans, so that a saved model runs without what made it.

Half precision is stored by its bits as int16, so that a cast of the model leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..registry import RESIDUES

BITS = torch.arange(8, dtype=torch.uint8)

SAME = 1e-6
"""Relative to the merged tensor, about what float32 rounds: less of a difference is none."""

Kind = TypeVar("Kind", bound="type[Residue]")


@dataclass
class TaskTensor:
    """What one tensor of the trunk is for one task; all in merged units, float64.

    Attributes:
        task, tensor: whose, and its name in the trunk.
        merged: W, which the trunk has.
        own: W_t, the task's own, which the merged one would be with all of its residue.
        origin: where its task vector starts: its own base's tensor, or without bases the first expert's.
        gram: E[x x^T] of the layer's inputs `[in, in]`, where it is known.
        transposed: whether the layer keeps its matrix as `[in, out]`.
    """

    task: str
    tensor: str
    merged: Tensor
    own: Tensor
    origin: Tensor
    gram: Tensor | None = None
    transposed: bool = False

    @property
    def residue(self) -> Tensor:
        """W_t - W."""
        return self.own - self.merged

    @property
    def vector(self) -> Tensor:
        """The task vector, from the origin."""
        return self.own - self.origin

    def energy(self, error: Tensor) -> float:
        """The squared output error of an error of the tensor, relative to the output."""
        return self._square(error) / self.output_energy

    @property
    def output_energy(self) -> float:
        """The squared output; never 0."""
        return max(self._square(self.own), 1e-300)

    def _square(self, tensor: Tensor) -> float:
        if self.gram is None:
            return float(tensor.square().sum())
        matrix = self.matrix(tensor)
        return float((matrix @ self.gram * matrix).sum())

    def matrix(self, tensor: Tensor) -> Tensor:
        """`[out, in]`."""
        return (tensor.transpose(0, 1) if self.transposed else tensor).flatten(1)


class Residue(nn.Module):
    """One packed tensor of one task, made with its shape and a size that says how much of it there is."""

    needs_origin: ClassVar[bool] = False
    """Whether it is of task vectors: a base is then taken whatever the rule."""

    stepwise: ClassVar[bool] = False
    """Whether it can be kept more or less of: see `Stepwise`."""

    shape: tuple[int, ...]
    size: int

    def __init__(self, shape: Sequence[int], size: int = 1) -> None:
        super().__init__()
        self.shape, self.size = tuple(shape), size

    def tensor(self, shared: Any = None) -> Tensor:
        """R, float32; `shared` is what all tasks have in common of this tensor, where the kind keeps something."""
        raise NotImplementedError

    @classmethod
    def pack(cls, tensors: Sequence[TaskTensor]) -> tuple[Residue | None, list[Residue]]:
        """What all tasks share (None: nothing) and every task's own of one tensor; options are keyword-only."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: zero."""
        for buffer in self.buffers():
            buffer.zero_()


class Stepwise(Residue):
    """A kind that can be kept more or less of: a budget of bytes is spent on it, step by step."""

    stepwise = True

    @classmethod
    def steps(cls, tensor: TaskTensor) -> Iterator[tuple[int, float]]:
        """Of every further step the bytes that it costs, and by how much the squared output error falls."""
        raise NotImplementedError

    @classmethod
    def packed(cls, tensor: TaskTensor, size: int) -> Residue:
        """So many steps of a tensor."""
        raise NotImplementedError

    @classmethod
    def pack(cls, tensors: Sequence[TaskTensor]) -> tuple[Residue | None, list[Residue]]:
        """Nothing: what is kept of a tensor follows from all of them and the budget."""
        raise NotImplementedError


def register(name: str) -> Callable[[Kind], Kind]:
    """Decorator that makes a class a kind of residue."""

    def decorate(kind: Kind) -> Kind:
        RESIDUES.add(name, kind)
        return kind

    return decorate


class Dense(Stepwise):
    """All entries in half precision, for what is no matrix. `size` says nothing."""

    def __init__(self, shape: Sequence[int], size: int = 1) -> None:
        super().__init__(shape, size)
        self.register_buffer("values", torch.zeros(self.shape, dtype=torch.int16))

    def tensor(self, shared: Any = None) -> Tensor:
        return from_half(self.values)

    @classmethod
    def steps(cls, tensor: TaskTensor) -> Iterator[tuple[int, float]]:
        yield 2 * tensor.merged.numel(), tensor.energy(tensor.residue)

    @classmethod
    def packed(cls, tensor: TaskTensor, size: int = 1) -> Residue:
        return cls(tensor.merged.shape).set(tensor.residue)

    @torch.no_grad()
    def set(self, tensor: Tensor) -> Dense:
        self.values.copy_(to_half(tensor))
        return self


class SharedVector(Residue):
    """What masks of all tasks select from: a vector V of which every task takes a part, from the origin.

    A task's tensor is origin + part of V, so that its residue is part of V + (origin - W). Where W = origin + c V, as
    after task arithmetic with V the sum of the task vectors, the second term is -c V and costs a number; otherwise
    it is kept as well, for every origin that there is. All in half precision, relative to their largest entry:
    `values` `[size, *shape]`, `scales` float32 `[size]`, `share` c.
    """

    def __init__(self, shape: Sequence[int], size: int = 1) -> None:
        super().__init__(shape, size)
        self.register_buffer("values", torch.zeros(size, *self.shape, dtype=torch.int16))
        self.register_buffer("scales", torch.zeros(size))
        self.register_buffer("share", torch.zeros(()))

    def vector(self, number: int = 0) -> Tensor:
        """V, float32, or another one of those that are kept."""
        return from_half(self.values[number]) * self.scales[number].float()

    def back(self, vector: Tensor, origin: int) -> Tensor:
        """The origin of that number less W, given V."""
        return -self.share.float() * vector if self.size == 1 else self.vector(1 + origin)

    @classmethod
    @torch.no_grad()
    def of(cls, vector: Tensor, merged: Tensor, origins: Sequence[Tensor]) -> SharedVector:
        moved = merged - origins[0]
        share = (moved * vector).sum() / vector.square().sum().clamp_min(1e-300)
        alone = len(origins) == 1 and (moved - share * vector).norm() <= SAME * merged.norm()
        kept = [vector] if alone else [vector, *(origin - merged for origin in origins)]
        found = cls(vector.shape, len(kept))
        for number, tensor in enumerate(kept):
            scale = tensor.abs().max().clamp_min(1e-30)
            found.values[number] = to_half(tensor / scale)
            found.scales[number] = scale
        found.share.fill_(share if alone else 0)
        return found


class Masked(Residue):
    """A task takes of the shared vector V what its mask m says, times a scale: W_t = origin + scale m V.

    `bits` uint8 `[entries / 8]`, `scale` float32, `origin` the number of its origin.
    """

    needs_origin = True

    def __init__(self, shape: Sequence[int], size: int = 1) -> None:
        super().__init__(shape, size)
        self.register_buffer("bits", torch.zeros(-(-prod(shape) // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("origin", torch.zeros((), dtype=torch.uint8))

    def tensor(self, shared: Any = None) -> Tensor:
        vector = shared.vector()
        kept = self.scale.float() * from_bits(self.bits, self.shape) * vector
        return kept + shared.back(vector, int(self.origin))

    @classmethod
    def pair(
        cls, tensors: Sequence[TaskTensor], vector: Tensor, masks: Sequence[Tensor], scales: Sequence[Any]
    ) -> tuple[Residue, list[Residue]]:
        """The shared vector, and of every task its mask `shape`, bool, with its scale."""
        origins: list[Tensor] = []
        found: list[Residue] = []
        for tensor, mask, scale in zip(tensors, masks, scales, strict=True):
            number = next((i for i, origin in enumerate(origins) if torch.equal(origin, tensor.origin)), len(origins))
            origins += [tensor.origin] if number == len(origins) else []
            residue = cls(mask.shape)
            residue.bits.copy_(to_bits(mask))
            residue.scale.fill_(float(scale))
            residue.origin.fill_(number)
            found.append(residue)
        return SharedVector.of(vector, tensors[0].merged, origins), found


PARTS: dict[str, type[Residue]] = {"dense": Dense, "shared": SharedVector}
"""What all kinds have in common, and no one chooses."""


def kind_of(name: str) -> type[Residue] | None:
    """The class of a kind or part; None where there is no such thing."""
    return PARTS.get(name) or RESIDUES.find(name)


def name_of(residue: Residue) -> str:
    """The name that `kind_of` knows it by."""
    known = {kind: name for name, kind in PARTS.items()} | {RESIDUES.get(name): name for name in RESIDUES}
    return known[type(residue)]


def to_bits(mask: Tensor) -> Tensor:
    """Booleans as uint8 `[entries / 8]`, the last one filled up."""
    flat = mask.flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    return (padded.to(torch.uint8) << BITS.to(mask.device)).sum(1, dtype=torch.uint8)


def from_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The booleans again."""
    ones = bits[:, None] >> BITS.to(bits.device) & 1
    return ones.flatten()[: prod(shape)].reshape(tuple(shape)).bool()


def to_half(tensor: Tensor) -> Tensor:
    """float16, by its bits as int16."""
    return tensor.to(torch.float16).contiguous().view(torch.int16)


def from_half(values: Tensor) -> Tensor:
    """float32."""
    return values.view(torch.float16).float()
