"""Tensors that are read again: in memory up to a budget, beyond it in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


class Keeper:
    """Keeps groups of tensors; its files go when it goes.

    Args:
        memory_gb: what tensors may take in memory, all groups together.
    """

    def __init__(self, memory_gb: float) -> None:
        self.left = memory_gb * 2**30
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = count()

    def keep(self, tensors: Mapping[str, Tensor]) -> Callable[[], Tensors]:
        """What gives the tensors back whenever it is called. Views cost nothing: somebody else holds their memory."""
        own = dict(tensors)
        size = sum(tensor.nbytes for tensor in own.values() if not tensor._is_view())
        if size <= self.left:
            self.left -= size
            return lambda: own
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hf_zipit-")
        path = Path(self._folder.name) / f"{next(self._numbers)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, path)
        return partial(load_file, path)
