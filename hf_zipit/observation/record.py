"""Hooks: what passes the probes of a model while it runs, as rows of units.

A probe is one axis of a module's first input or of its output. The axis is moved last, the others are flattened: a row
is one sample, token or position. Rows of padded tokens are left out, for they would count as data. A module that is
called several times in a forward pass adds the rows of all its calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_zipit.errors import ExpertError, SpecError
from hf_zipit.steady import same_draws
from hf_zipit.symmetry.spec import Probe

Choose = Callable[[str, int, int], Tensor | None]
"""`choose(probe, call, rows)`: the rows to keep, or None for all of them."""


def probe_name(probe: Probe) -> str:
    """A probe's identity: `module:where:axis`, and which units where it has not all of them."""
    units = "" if probe.span is None else f":{probe.span[1]}-{probe.span[2]}"
    return f"{probe.module}:{probe.where}:{probe.axis}{units}"


def keep_all(probe: str, call: int, rows: int) -> None:
    """Choose every row."""


def mask_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """`[samples, tokens]`, zero where a token is padding."""
    mask = inputs.get("attention_mask")
    return mask if mask is not None and mask.dim() == 2 else None


def unpadded(value: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """A value with the axis of its units moved last, and without the rows that its model's `mask_of` leaves out."""
    rows = value.detach().movedim(axis, -1)
    if mask is not None and rows.dim() > 2 and rows.shape[:2] == mask.shape:
        rows = rows[mask.bool().to(rows.device)]
    return rows


def choose_rows(row_fraction: float, minimum: int, seed: int, batch: int) -> Choose:
    """Choose a seeded share of the rows, at least `minimum` of them where there are that many.

    The choice depends on the batch, the probe and the call, and on nothing else: every expert is asked for the same
    rows, and it does not matter which process asks.
    """

    def choose(probe: str, call: int, rows: int) -> Tensor | None:
        kept = max(minimum, round(row_fraction * rows), 1)
        if kept >= rows:
            return None
        digest = hashlib.sha256(f"{seed}/{batch}/{probe}/{call}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return torch.randperm(rows, generator=generator)[:kept].sort().values

    return choose


class Recorder:
    """Records one forward pass at a time at the probes of one or more models of the same architecture.

    `units` is the number of units that each probe's axis must have.
    """

    def __init__(self, units: Mapping[Probe, int]) -> None:
        self.units = dict(units)
        self._expert = ""
        self._mask: Tensor | None = None
        self._choose: Choose = keep_all
        self._rows: dict[str, list[Tensor]] = {}
        self._sums: list[Tensor] = []
        self._every_value = False

    @contextmanager
    def attached(self, models: Mapping[str, nn.Module]) -> Iterator[Recorder]:
        """Put the hooks on; they are taken off on leaving, also after an error."""
        handles: list[torch.utils.hooks.RemovableHandle] = []
        hooked: set[tuple[int, Probe]] = set()  # experts may share modules, or be one object
        try:
            for task, model in models.items():
                for probe in self.units:
                    module = _module(model, probe, task)
                    if (id(module), probe) not in hooked:
                        hooked.add((id(module), probe))
                        handles.append(self._hook(module, probe))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self,
        task: str,
        model: nn.Module,
        inputs: Mapping[str, Any],
        choose: Choose = keep_all,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run an expert, the hooks on, and return float32 rows `[rows, units]` for every probe that fired.

        What a model draws at random it draws the same in every run: rows of experts are paired.
        `mask`, `[samples, tokens]`, is zero where a token is padding.

        Raises:
            ExpertError: if a feature is NaN or infinite.
            SpecError: if a probe's axis is not there or has another size.
        """
        self._expert, self._choose, self._mask = task, choose, mask
        try:
            for self._every_value in (False, True):
                self._rows, self._sums = {}, []
                with same_draws():
                    model(**inputs)
                if self._every_value or _finite(self._sums):
                    break
            return {name: torch.cat(calls) for name, calls in self._rows.items()}
        finally:
            self._rows, self._sums, self._mask, self._choose = {}, [], None, keep_all

    def _hook(self, module: nn.Module, probe: Probe) -> torch.utils.hooks.RemovableHandle:
        if probe.where == "input":
            return module.register_forward_pre_hook(partial(self._see_input, probe), with_kwargs=True)
        return module.register_forward_hook(partial(self._see_output, probe))

    def _see_input(self, probe: Probe, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._record(probe, _first_tensor((*args, *kwargs.values())))

    def _see_output(self, probe: Probe, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._record(probe, _first_tensor((output,)))

    def _record(self, probe: Probe, tensor: Tensor | None) -> None:
        units, name = self.units[probe], probe_name(probe)
        width, start, stop = probe.span or (units, 0, units)
        on_axis = units // (stop - start) * width
        if tensor is None or not -tensor.ndim <= probe.axis < tensor.ndim or tensor.shape[probe.axis] != on_axis:
            found = "no tensor" if tensor is None else f"a tensor of shape {list(tensor.shape)}"
            raise SpecError(
                f"The {probe.where} of {probe.module or 'the model'} should have {on_axis} units on axis "
                f"{probe.axis}, but the expert {self._expert!r} has {found} there: the spec is of another model."
            )
        rows = unpadded(tensor, probe.axis, self._mask)
        rows = rows.reshape(-1, on_axis // width, width)[..., start:stop].reshape(-1, units)
        if not self._every_value:
            # A finite sum costs a fraction of looking at every value, and proves as much.
            self._sums.append(rows.sum(dtype=torch.float32))
        elif not rows.isfinite().all():
            raise ExpertError(
                f"The expert {self._expert!r} computes NaN or infinite values at the {probe.where} of "
                f"{probe.module or 'the model'}: check its weights, its dtype and the calibration inputs."
            )
        calls = self._rows.setdefault(name, [])
        kept = self._choose(name, len(calls), len(rows))
        if kept is not None:
            rows = rows[kept.to(rows.device)]
        # A copy in any case: modules that come later may change the tensor in place.
        calls.append(rows.to(torch.float32, copy=True))


def _finite(sums: Sequence[Tensor]) -> bool:
    """Whether all are finite; asked of an accelerator once."""
    return not sums or bool(torch.stack([x.to(sums[0].device) for x in sums]).isfinite().all())


def _module(model: nn.Module, probe: Probe, task: str) -> nn.Module:
    try:
        return model.get_submodule(probe.module)
    except AttributeError:
        raise SpecError(f"The expert {task!r} has no module {probe.module!r}, where the spec has a probe.") from None


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    """The first tensor, looking into tuples and model outputs."""
    for value in values:
        if isinstance(value, Tensor):
            return value
        inside = tuple(value.values()) if isinstance(value, Mapping) else value
        if isinstance(inside, (tuple, list)) and (found := _first_tensor(inside)) is not None:
            return found
    return None
