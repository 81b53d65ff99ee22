"""Forward passes on fake tensors: what is known in them (how images are cut into patches), and no logs of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class KnownNumbers(TorchFunctionMode):
    """What is computed of known integers alone is known, too, and no part of the graph: lengths, places in a grid."""

    MADE: ClassVar = {torch.tensor, torch.arange, torch.zeros, torch.ones, torch.full}
    WHOLE: ClassVar = {Tensor.long, Tensor.int}  # of fractions of known integers

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(type(x) is Tensor and (function in self.WHOLE or not x.is_floating_point()) for x in tensors)
        if known and (tensors or function in self.MADE):
            with unset_fake_temporarily(), disable_proxy_modes_tracing():
                found = function(*args, **kwargs)
            if tensors or not found.is_floating_point():
                return found
        return function(*args, **kwargs)


@contextmanager
def quietly() -> Iterator[None]:
    """What `torch.export` finds odd is told in the error, if it is one; it would print whole graphs."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    logs = [logging.getLogger(name) for name in names]
    before = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
