"""Tensors in safetensors files: what is in one, told by its header, and a file written tensor by tensor.

`safetensors` itself writes what it holds in memory at once. The format is plain: the length of a header in eight
bytes, the header as JSON (dtype, shape and place of every tensor), and the tensors' bytes one after the other.

Invariants: a file has the bytes that `safetensors.torch.save_file` would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of dtypes, in the order in which their tensors stand in a file."""

PART = 1 << 20
"""Entries that are cast at a time."""

ALIGNMENT = 8
"""The header is filled up with spaces, so that the tensors start at a multiple of this."""


def dtypes(folder: Path) -> Iterator[tuple[str, str]]:
    """The names of the tensors in a model's folder, and the format's names of their dtypes. Reads headers only."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_slice(name).get_dtype()


def half_precision(folder: Path) -> torch.dtype | None:
    """The half precision of all weights in a model's folder; None where some are of another."""
    found = {kind for _, kind in dtypes(folder)}
    kinds = {dtype for dtype, name in NAMES.items() if name in found and dtype.is_floating_point}
    return kinds.pop() if len(kinds) == 1 and kinds <= {torch.float16, torch.bfloat16} else None


def write_tensors(path: Path, like: Mapping[str, Tensor], pieces: Callable[[str], Iterable[Tensor]]) -> None:
    """Write a safetensors file, holding one tensor at a time, or one piece of it.

    Args:
        path: the file.
        like: tensors with the dtypes and shapes of those to be written, by name; they may be on the meta device.
        pieces: gives the tensors, one by one, each in pieces whose entries follow each other; they are cast to the
            dtype that was announced.

    Raises:
        ValueError: a tensor has another shape than was announced.
    """
    kinds = list(NAMES)
    order = sorted(like, key=lambda name: (kinds.index(like[name].dtype), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + like[name].numel() * like[name].element_size()
        entries[name] = {
            "dtype": NAMES[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            shape, count = like[name].shape, 0
            for piece in pieces(name):
                if piece.shape[1:] != shape[1:]:
                    raise ValueError(f"the tensor {name} has a piece {list(piece.shape)}, but is {list(shape)}")
                count += piece.numel()
                for part in piece.detach().reshape(-1).split(PART):
                    file.write(part.to("cpu", like[name].dtype).view(torch.uint8).numpy())
            if count != shape.numel():
                raise ValueError(f"the tensor {name} has {count} entries, but is {list(shape)}")


def damage(found: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint, of the loading info of `from_pretrained`; None where every tensor was found."""
    kinds = {
        "missing_keys": "lacks {}",
        "unexpected_keys": "has {}, which its class does not know",
        "unreal_keys": "has no real numbers (integers, as quantised weights are, or others) in {}",
        "mismatched_keys": "has another shape than its configuration says in {}",
    }
    for kind, text in kinds.items():
        names = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in found.get(kind) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return text.format(f"the tensor {names[0]}{more}")
    return None
