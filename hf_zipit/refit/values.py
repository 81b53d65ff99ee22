"""What every op of the experts and of the merged model gives, for all micro-batches at once.

All micro-batches advance together, op by op, and a value is kept only while a later op still reads it: on the device
while there is room, in memory up to a budget and in temporary files beyond it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from hf_zipit.data.calibration import MicroBatch
from hf_zipit.data.processes import free_memory
from hf_zipit.refit.program import Program

MERGED = -1
"""Whose values: the merged model's place beside the experts 0 ... T - 1."""


class Store:
    """One value per key: a tensor, or whatever a graph's node gives. Use it as a context manager.

    Tensors of an accelerator stay there while at least half of its memory is left to those who work; then they go to
    the CPU's memory, and beyond the budget to files.
    """

    def __init__(self, budget: float, device: torch.device | str = "cpu") -> None:
        """`budget` in bytes of the CPU's memory; values come back on the device."""
        self._device = torch.device(device)
        self._room = {"there": free_memory(self._device) / 2 if self._device.type != "cpu" else 0.0, "here": budget}
        self._held: dict[Hashable, Any] = {}
        self._files: dict[Hashable, Path] = {}
        self._bytes = {"there": 0, "here": 0}
        self.peak = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._files

    def __getitem__(self, key: Hashable) -> Any:
        if key in self._files:
            return load_file(self._files[key])["x"].to(self._device)
        value = self._held[key]
        return value.to(self._device) if isinstance(value, Tensor) else value

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.pop(key)
        size, place = _bytes(value), self._place(value)
        if isinstance(value, Tensor) and self._bytes[place] + size > self._room[place] and place == "there":
            value, place = value.cpu(), "here"
        if isinstance(value, Tensor) and self._bytes[place] + size > self._room[place]:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="hf_zipit-")
            self._count += 1
            path = Path(self._folder.name) / f"{self._count}.safetensors"
            save_file({"x": value.contiguous().clone()}, path)
            self._files[key] = path
            return
        self._held[key] = value
        self._bytes[place] += size
        self.peak = max(self.peak, sum(self._bytes.values()))

    def pop(self, key: Hashable) -> None:
        """Forget a key, if it is there."""
        if key in self._files:
            self._files.pop(key).unlink()
        elif key in self._held:
            value = self._held.pop(key)
            self._bytes[self._place(value)] -= _bytes(value)

    @staticmethod
    def _place(value: Any) -> str:
        """Where a value's bytes count: `there`, on an accelerator, or `here`."""
        return "there" if isinstance(value, Tensor) and value.device.type != "cpu" else "here"


def _bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


RECENT = 16
"""This many of a model's tensors stay on the device after they were used, for a layer's are used again soon,"""

SHARE = 0.25
"""and more while those of all models together take no more than this share of what is free there."""


class OnDevice(MutableMapping[str, Tensor]):
    """A model's tensors in float32 on a device, wherever they are and whatever their dtype; moved when they are read.

    What is written goes to the tensors themselves, where they are.
    """

    def __init__(self, tensors: MutableMapping[str, Tensor], device: torch.device, models: int = 1) -> None:
        """`models`: how many share the device."""
        self._tensors, self._device = tensors, device
        self._recent: dict[str, Tensor] = {}
        self._room = 0.0 if device.type == "cpu" else SHARE * free_memory(device) / models

    def __getitem__(self, name: str) -> Tensor:
        if name in self._recent:
            return self._recent[name]
        tensor = self._tensors[name]
        moved = tensor.to(self._device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        return tensor if moved is tensor else self._remember(name, moved)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        home = self._tensors[name]
        self._tensors[name] = tensor.to(home.device, home.dtype)
        if home.device != self._device:
            self._remember(name, tensor)

    def _remember(self, name: str, tensor: Tensor) -> Tensor:
        self._forget(name)
        self._recent[name] = tensor
        self._room -= _bytes(tensor)
        while len(self._recent) > RECENT and self._room < 0:
            self._forget(next(iter(self._recent)))
        return tensor

    def _forget(self, name: str) -> None:
        self._room += _bytes(self._recent.pop(name, None))

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Values:
    """The values of a program's nodes, by node, model and micro-batch.

    Attributes:
        device: where they are.
        tensors: of every model by name; the last one, at index `MERGED`, is the merged model's, and so is `solved`,
            where they are at home.
        batches: the micro-batches; `inputs`, theirs on the device.
        store: where values are kept, to be entered as a context.
    """

    def __init__(
        self,
        program: Program,
        experts: Sequence[Mapping[str, Tensor]],
        merged: Mapping[str, Tensor],
        batches: Sequence[MicroBatch],
        budget: float,
        device: torch.device,
    ) -> None:
        """`merged` are the merged model's tensors where they differ from the first expert's; the budget is bytes."""
        self.program, self.batches, self.device = program, batches, device
        self.inputs = [{name: tensor.to(device) for name, tensor in batch.inputs.items()} for batch in batches]
        self.solved = {**experts[0], **merged}
        models = (*map(dict, experts), self.solved)
        self.tensors = [OnDevice(own, device, len(models)) for own in models]
        self.store = Store(budget, device)

    @property
    def experts(self) -> range:
        return range(len(self.tensors) - 1)

    @property
    def merged(self) -> MutableMapping[str, Tensor]:
        """The merged model's tensors; solutions are written into them."""
        return self.tensors[MERGED]

    def compute(self, node: fx.Node, who: int) -> None:
        """Run one op of one model on all micro-batches."""
        for b, inputs in enumerate(self.inputs):
            self.store[node, who, b] = self.program.run(
                node, lambda used, b=b: self.store[used, who, b], self.tensors[who], inputs, who == MERGED
            )

    def advance(self, nodes: Sequence[fx.Node], who: int, kept: Collection[fx.Node]) -> None:
        """Run ops in a row of one model, one micro-batch after the other; only the values of some are kept."""
        last = {used: i for i, node in enumerate(nodes) for used in node.all_input_nodes}
        for b, inputs in enumerate(self.inputs):
            found: dict[fx.Node, Any] = {}
            for i, node in enumerate(nodes):
                value = self.program.run(
                    node,
                    lambda used, b=b, found=found: found[used] if used in found else self.store[used, who, b],
                    self.tensors[who],
                    inputs,
                    who == MERGED,
                )
                if node in kept:
                    self.store[node, who, b] = value
                found[node] = value
                for used in (node, *node.all_input_nodes):
                    if last.get(used, i) <= i:
                        found.pop(used, None)

    def of(self, node: Any, who: int, b: int) -> Tensor:
        """What a node gives: a parameter, an input of the model or the result of an op."""
        name = self.program.tensor_of(node)
        if name is not None:
            return self.tensors[who][name]
        return self.inputs[b][node.name] if node.op == "placeholder" else self.store[node, who, b]

    def peek(self, node: fx.Node, b: int, known: Mapping[fx.Node, Tensor]) -> Any:
        """A later value of the merged model, from values that are there and `known` ones; not kept."""
        if node in known:
            return known[node]
        if (node, MERGED, b) in self.store:
            return self.store[node, MERGED, b]
        return self.program.run(node, lambda used: self.peek(used, b, known), self.merged, self.inputs[b], True)

    def follow(
        self,
        nodes: Iterable[fx.Node],
        known: Mapping[fx.Node, Tensor],
        who: int,
        b: int,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> dict[fx.Node, Any]:
        """Known values and those of ops in a row that follow from them, which are not kept.

        `tensors` are a model's own where none are given.
        """
        found = dict(known)
        for node in nodes:
            found[node] = self.program.run(
                node,
                lambda used: self.peek(used, b, found) if who == MERGED or used in found else self.of(used, who, b),
                self.tensors[who] if tensors is None else tensors,
                self.inputs[b],
                who == MERGED,
            )
        return found

    def run_again(self, changed: Iterable[fx.Node], upto: fx.Node) -> None:
        """Bring the merged model's values before a node up to date after weights were written."""
        stale = set(changed)
        for node in self.program.nodes[: self.program.position[upto]]:
            if node in stale or not stale.isdisjoint(node.all_input_nodes):
                stale.add(node)
                self.compute(node, MERGED)

    def forget(self, node: fx.Node) -> None:
        for b in range(len(self.batches)):
            for who in (MERGED, *self.experts):
                self.store.pop((node, who, b))
