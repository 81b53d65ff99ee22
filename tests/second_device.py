"""A second device on a machine that has none: tensors "on" it are the CPU's, and know by a mark where they belong.

    with second_device() as device:
        merge(experts, data, accelerator=accelerator_on(device))

Every call of torch passes through a `TorchFunctionMode`. Where an op is given tensors of both devices, it raises as
CUDA would; results belong where the inputs do; moving copies and marks. The mark is on the storage, so that views,
parameters and in-place ops keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hf_zipit.factorise import one_thread

SECOND, FIRST = torch.device("cuda:0"), torch.device("cpu")

MOVES = {"to", "cpu", "cuda", "type_as"}
READS_INDICES = {"__getitem__", "index", "index.Tensor", "index_put_", "__setitem__"}
"""A CPU tensor may index one of another device."""

HOST_ONLY = {"numpy", "__array__"}

TAKES_BOTH = {"copy_", "__set__", "_has_compatible_shallow_copy_type"}

ONLY_READS_DEVICES = {"_parse_to", "device"}


class SecondDevice(TorchFunctionMode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._marked: dict[int, StorageWeakRef] = {}

    def mark(self, tensor: Tensor) -> None:
        """From here on a tensor, and all that share its memory, are on the second device."""
        if not self.is_second(tensor):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._marked[reference.cdata] = reference

    def unmark(self, tensor: Tensor) -> None:
        self._marked.pop(StorageWeakRef(tensor.untyped_storage()).cdata, None)

    def is_second(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.is_meta:
            return False
        found = self._marked.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in ONLY_READS_DEVICES:
            return func(*args, **kwargs)
        if name == "__get__":
            return self._attribute(func, args[0])
        values = list(_leaves((args, kwargs)))
        given = [x for x in values if isinstance(x, Tensor)]
        marks = [self.is_second(x) for x in given]
        if name == "get_device":
            return 0 if marks[0] else -1
        if name in HOST_ONLY and any(marks):
            raise TypeError(f"{name} of a tensor that is not on the CPU")
        if name in MOVES:
            return self._move(func, name, args, kwargs)
        named = [x for x in values if isinstance(x, torch.device)]
        if isinstance(kwargs.get("device"), (str, int)):
            named.append(torch.device(kwargs["device"]))
        target = SECOND if any(device.type == SECOND.type for device in named) else FIRST if named else None
        sizes = [mark for x, mark in zip(given, marks, strict=True) if x.dim()]
        if len(set(sizes)) > 1 and name not in TAKES_BOTH and not (name in READS_INDICES and marks[0]):
            where = [("second" if mark else "CPU", list(x.shape)) for x, mark in zip(given, marks, strict=True)]
            raise AssertionError(f"{name} is given tensors of two devices: {where}")
        on_second = target == SECOND or (target is None and any(sizes or marks))
        generator = kwargs.get("generator")
        if generator is not None and (on_second or any(marks)):
            raise AssertionError(f"{name} draws on the second device with a generator of the CPU")
        if target == SECOND:
            args, kwargs = tree_map(lambda x: FIRST if _names_second(x) else x, (args, dict(kwargs)))
        if name == "__set__" and func.__self__.__name__ == "data":
            (self.mark if marks[1] else self.unmark)(args[1])
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        if name in TAKES_BOTH:
            return found
        return self._marking(found) if on_second else found

    def _marking(self, found: Any) -> Any:
        for x in _leaves(found):
            if type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta:
                self.mark(x)
        return found

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        attribute, second = func.__self__.__name__, self.is_second(tensor)
        if attribute == "is_cuda":
            return second
        if attribute == "device" and second:
            return SECOND
        return self._marking(func(tensor)) if second else func(tensor)

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        tensor, like = args[0], next((x for x in args[1:] if isinstance(x, Tensor)), kwargs.get("other"))
        named = [torch.device(x) for x in (*args[1:], *kwargs.values()) if _is_device(x)]
        before = self.is_second(tensor)
        if name in ("cpu", "cuda"):
            after = name == "cuda"
        elif like is not None:
            after = self.is_second(like)
        else:
            after = named[0].type == SECOND.type if named else before
        args, kwargs = tree_map(lambda x: FIRST if _names_second(x) else x, (args, dict(kwargs)))
        found = func(*args, **kwargs) if name != "cuda" else tensor
        if before != after and found.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            found = found.clone()
        if type(found) is Tensor or isinstance(found, torch.nn.Parameter):
            (self.mark if after else self.unmark)(found) if not found.is_meta else None
        return found


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and mappings; a merge makes 80,000 calls, torch's own `tree_leaves` is slow."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _is_device(x: Any) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda", "meta"))


def _names_second(x: Any) -> bool:
    return _is_device(x) and torch.device(x).type == SECOND.type


class _Accelerator(Accelerator):
    @property
    def device(self) -> torch.device:
        return SECOND


def accelerator_on_second() -> Accelerator:
    """An accelerator whose device is the second one."""
    return _Accelerator(cpu=True)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Inside, `torch.device("cuda")` is a device whose tensors may not meet the CPU's.

    All runs in one thread, for others do not see it.
    """
    with one_thread(), SecondDevice():
        yield SECOND
