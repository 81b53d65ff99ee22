"""Hooks: what the layers of a model are fed, as rows, summed up while it runs. See `statistics.py` for the sums.

A layer is a module with a weight that reads its input: a linear map, a convolution (its rows are the patches under the
kernel) or a norm (its rows are the normalised inputs). Rows of padded tokens are left out.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_zipit.errors import ExpertError
from hf_zipit.observation.record import unpadded
from hf_zipit.observation.statistics import Summed, product_sum


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its input and then scales it, unit by unit."""
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None and module.weight.dim() == 1


def is_layer(module: nn.Module) -> bool:
    """Whether a module's inputs can be observed."""
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    return plain or isinstance(module, (nn.Linear, Conv1D)) or is_norm(module)


def rows_of(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer reads of its input: `[rows, in]`."""
    if isinstance(module, nn.Conv2d):
        padded = functional.pad(x, module._reversed_padding_repeated_twice)
        patches = functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return patches.mT.flatten(0, 1)
    if is_norm(module):
        plain = {name: torch.full_like(p, float(name == "weight")) for name, p in module.named_parameters()}
        unhooked = copy.copy(module)
        unhooked._forward_pre_hooks = OrderedDict()
        x = torch.func.functional_call(unhooked, plain, (x,))
    axis = 1 if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) else -1
    return unpadded(x, axis, mask).flatten(0, -2)


class InputSums:
    """Sums up what some layers of one model read.

    Attributes:
        sums: by the name of the layer's weight.
        same: weights of layers that read the very tensor that the layer before them read, by that one's name.
    """

    def __init__(self, names: Collection[str], task: str) -> None:
        self.names, self.task = names, task
        self.sums: dict[str, Summed] = {}
        self.same: dict[str, str] = {}
        self.mask: Tensor | None = None
        self._last: tuple[str, Tensor] | None = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[InputSums]:
        """Put the hooks on; they are taken off on leaving, also after an error."""
        handles = []
        try:
            for path, module in model.named_modules():
                name = f"{path}.weight".removeprefix(".")
                if name in self.names and is_layer(module):
                    handles.append(module.register_forward_pre_hook(partial(self._see, name), with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not is_norm(module) and not isinstance(module, nn.Conv2d):
            if self._last is not None and self._last[1] is x and self._last[0] != name:
                self.same[name] = self._last[0]
                return
            self._last = name, x
        rows = rows_of(module, x.detach(), self.mask)
        found = rows.double().square().sum(0).cpu() if is_norm(module) else product_sum(rows, rows).cpu()
        if not found.isfinite().all():
            raise ExpertError(f"The expert {self.task!r} computes NaN or infinite values where {name} reads them.")
        made = Summed(float(len(rows)), found)
        self.sums[name] = self.sums[name] + made if name in self.sums else made
