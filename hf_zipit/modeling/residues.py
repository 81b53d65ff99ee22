"""Residues: what a task's own weights are more than the merged ones, in a few bits, added while that task runs alone.

A tensor W of the trunk is W + R_t for the time in which its module runs for task t. In a joint forward
pass the trunk runs once for all tasks, without any residue. Residues stay packed in memory, and are unpacked module by
module as these run:

- `signs`: K planes, R = sum_k scale_k sign_k, with one bit for every entry and plane (a binarised task vector,
  arXiv 2412.00081's T-Switch without its zeros, and the same again of what it leaves);
- `low-rank`: R = left right, both factors in half precision;
- `dense`: R in half precision, for vectors.

State dict: `residues.NUMBER.TASK.TENSOR.{bits,scales,left,right,values}`, NUMBER counting the modules that have some.
Half precision is stored by its bits as int16, so that a cast of the model leaves it alone.

Invariant: a saved and loaded model computes bit-identical outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ZipItError
from .trunk import running_task

BITS = torch.arange(8, dtype=torch.uint8)

LOCK = threading.RLock()
"""Held while a module has a task's tensors: another thread may run it for another task."""


class Residue(nn.Module):
    """One packed tensor."""

    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """R, float32."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: zero."""
        for buffer in self.buffers():
            buffer.zero_()


class Signs(Residue):
    """Planes of signs, each with a scale: `bits` uint8 `[planes, entries / 8]`, `scales` float32 `[planes]`."""

    def __init__(self, shape: Sequence[int], size: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("bits", torch.zeros(size, -(-prod(shape) // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(size))

    def tensor(self) -> Tensor:
        total = torch.zeros(prod(self.shape), device=self.bits.device)
        for bits, scale in zip(self.bits, self.scales.float(), strict=True):
            ones = (bits[:, None] >> BITS.to(bits.device) & 1).flatten()[: len(total)]
            total += (ones.float() * 2 - 1) * scale
        return total.reshape(self.shape)

    @torch.no_grad()
    def set(self, tensor: Tensor) -> Signs:
        """The planes of a tensor: of each the signs, and the mean magnitude of what the ones before it left."""
        left = tensor.double().flatten()
        for k in range(len(self.bits)):
            scale, positive = left.abs().mean().float(), left >= 0
            padded = nn.functional.pad(positive, (0, self.bits.shape[1] * 8 - len(left))).reshape(-1, 8)
            self.bits[k] = (padded.to(torch.uint8) << BITS).sum(1, dtype=torch.uint8)
            self.scales[k] = scale
            left = left - torch.where(positive, scale, -scale)
        return self


class LowRank(Residue):
    """A product of factors `left` `[out, rank]` and `right` `[rank, in]`; further axes count as inputs."""

    def __init__(self, shape: Sequence[int], size: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("left", torch.zeros(shape[0], size, dtype=torch.int16))
        self.register_buffer("right", torch.zeros(size, prod(shape[1:]), dtype=torch.int16))

    def tensor(self) -> Tensor:
        left, right = (factor.view(torch.float16).float() for factor in (self.left, self.right))
        return (left @ right).reshape(self.shape)

    @torch.no_grad()
    def set(self, left: Tensor, right: Tensor) -> LowRank:
        self.left.copy_(left.to(torch.float16).contiguous().view(torch.int16))
        self.right.copy_(right.to(torch.float16).contiguous().view(torch.int16))
        return self


class Dense(Residue):
    """All entries. `size` says nothing."""

    def __init__(self, shape: Sequence[int], size: int = 1) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("values", torch.zeros(self.shape, dtype=torch.int16))

    def tensor(self) -> Tensor:
        return self.values.view(torch.float16).float()

    @torch.no_grad()
    def set(self, tensor: Tensor) -> Dense:
        self.values.copy_(tensor.to(torch.float16).contiguous().view(torch.int16))
        return self


KINDS: dict[str, type[Residue]] = {"signs": Signs, "low-rank": LowRank, "dense": Dense}


class ModuleResidues(nn.ModuleDict):
    """One module's residues by task and by tensor, and the hooks that put them in and take them out again.

    `found`: by task and by the tensor's name in the module.
    """

    def __init__(self, found: Mapping[str, Mapping[str, Residue]]) -> None:
        super().__init__({task: nn.ModuleDict(own) for task, own in found.items()})
        self._kept: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: the module has the running task's tensors."""
        task = running_task()
        LOCK.acquire()
        for name, residue in self[task].items() if task in self else ():
            home = module._parameters if name in module._parameters else module._buffers
            own = home[name]
            self._kept.append((home, name, own))
            home[name] = own + residue.tensor().to(own)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called whatever happened, in `enter` as well: the module has its own tensors again."""
        while self._kept:
            home, name, own = self._kept.pop()
            home[name] = own
        LOCK.release()


def make_residues(settings: Sequence[Mapping[str, Any]], trunk: nn.Module, names: Mapping[str, str]) -> nn.ModuleList:
    """The residues, zero, hooked to their modules; bound methods, so that a deep copy reads the copy's.

    Args:
        settings: `config.residues`: of each the `task`, the `tensor` of the trunk, its `shape`, the `kind` and the
            `size` (planes or rank). Raises ZipItError where there is no such task, module or kind.
        trunk: of the merged model.
        names: the tasks' names as modules.
    """
    by_module: dict[str, dict[str, dict[str, Residue]]] = {}
    for setting in settings:
        path, _, leaf = setting["tensor"].rpartition(".")
        if setting["kind"] not in KINDS or setting["task"] not in names:
            raise ZipItError(f"The residue {dict(setting)} is of no kind or no task that this model has.")
        made = KINDS[setting["kind"]](setting["shape"], setting["size"])
        by_module.setdefault(path, {}).setdefault(names[setting["task"]], {})[leaf] = made
    found = nn.ModuleList()
    for path, residues in by_module.items():
        try:
            module = trunk.get_submodule(path)
        except AttributeError:
            raise ZipItError(f"residues names '{path}', which is not a module of the trunk.") from None
        own = ModuleResidues(residues)
        module.register_forward_pre_hook(own.enter)
        module.register_forward_hook(own.leave, always_call=True)
        found.append(own)
    return found


def residue_of(residues: Iterable[nn.Module], settings: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Any:
    """The residues in the order of their settings."""
    numbers: dict[str, int] = {}
    for setting in settings:
        numbers.setdefault(setting["tensor"].rpartition(".")[0], len(numbers))
    modules = list(residues)
    for setting in settings:
        path, _, leaf = setting["tensor"].rpartition(".")
        yield modules[numbers[path]][names[setting["task"]]][leaf]


def residue_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a merged model without its residues, and of these."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    kept = sum(size for name, size in sizes.items() if name.startswith("residues."))
    return sum(sizes.values()) - kept, kept
