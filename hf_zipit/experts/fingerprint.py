"""Fingerprints: sha256 over weights and calibration batches, so that saved moments are only used where they belong.

Weights and data are hashed part by part as they are read; nothing is copied as a whole. Names, dtypes and shapes
are hashed with the bytes; an expert's task is not: the same expert under another name keeps its fingerprint. So does
one in half precision that is loaded in float32, which changes no value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

PART = 1 << 20
"""Entries that are hashed at a time."""


TOGETHER = 2
"""Models that are hashed at a time, each by a thread of its own."""


def fingerprint_experts(experts: Mapping[str, nn.Module]) -> dict[str, str]:
    """The sha256 of every expert's parameters and persistent buffers, by task.

    Of a model one module is read at a time: one with offloaded weights (`device_map`) is never loaded as a whole.
    """
    once = {id(expert): expert for expert in experts.values()}
    with ThreadPoolExecutor(TOGETHER) as pool:
        prints = dict(zip(once, pool.map(_fingerprint_module, once.values()), strict=True))
    return {task: prints[id(expert)] for task, expert in experts.items()}


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], label: str = "") -> str:
    """The sha256 of named tensors in the order given, and of `label`."""
    digest = hashlib.sha256(label.encode())
    for name, tensor in tensors:
        _update(digest, name, tensor)
    return digest.hexdigest()


def digest_strings(parts: Iterable[str]) -> str:
    """The sha256 of strings in the order given."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fingerprint_module(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        # Offloaded weights are on the meta device outside this context.
        with align_module_device(module):
            transient = module._non_persistent_buffers_set  # they follow from the configuration
            persistent = ((n, b) for n, b in module.named_buffers(recurse=False) if n not in transient)
            for name, tensor in chain(module.named_parameters(recurse=False), persistent):
                _update(digest, f"{path}.{name}", tensor)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    dtype = torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype
    digest.update(f"{name} {dtype} {tuple(tensor.shape)}".encode())
    # Part by part, for a tensor may be on a disk, and larger than memory.
    for part in tensor.detach().contiguous().reshape(-1).split(PART):
        digest.update(part.cpu().to(dtype).view(torch.uint8).numpy())
