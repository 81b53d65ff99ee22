"""Activations of the modules in progress, kept in memory up to a budget and in temporary files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MERGED = -1
"""Whose values: the merged model's place beside the experts 0 ... T - 1."""


class Store:
    """One value per key: a tensor, or whatever a graph's node gives. Use it as a context manager."""

    def __init__(self, budget: float) -> None:
        """`budget` in bytes."""
        self._budget = budget
        self._held: dict[Hashable, Any] = {}
        self._files: dict[Hashable, Path] = {}
        self._bytes = 0
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
            return load_file(self._files[key])["x"]
        return self._held[key]

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.pop(key)
        size = _bytes(value)
        if isinstance(value, Tensor) and self._bytes + size > self._budget:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="hf_zipit-")
            self._count += 1
            path = Path(self._folder.name) / f"{self._count}.safetensors"
            save_file({"x": value.contiguous().clone()}, path)
            self._files[key] = path
            return
        self._held[key] = value
        self._bytes += size
        self.peak = max(self.peak, self._bytes)

    def pop(self, key: Hashable) -> None:
        """Forget a key, if it is there."""
        if key in self._files:
            self._files.pop(key).unlink()
        elif key in self._held:
            self._bytes -= _bytes(self._held.pop(key))


def _bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
