"""What a merged model computes: multiply-accumulates of one sample answered for all tasks.

In a joint forward the modules of the trunk run once and everything else once for every task. The numbers are those of
the trace, at the size of its example inputs: for texts of another length they are others, but in nearly the same
proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn

from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec


def expert_macs(spec: MergeSpec) -> int:
    """Multiply-accumulates of one expert for one sample."""
    return sum(spec.macs.values()) // spec.samples


def merged_macs(spec: MergeSpec, config: Any, expert: nn.Module) -> int:
    """Multiply-accumulates of the merged model of a `config` for one sample and all tasks; `expert` is any of them."""
    wider = _widths(config.trunk_shapes, {name: tensor.shape for name, tensor in model_tensors(expert).items()})
    total = 0.0
    for module, macs in spec.macs.items():
        shared = any(module == path or module.startswith(f"{path}.") for path in config.shared)
        total += macs * wider.get(module, 1.0) * (1 if shared else len(config.tasks))
    return round(total / spec.samples)


def _widths(merged: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, float]:
    """By module, how many times as many elements as an expert's its largest tensor has."""
    found: dict[str, tuple[int, float]] = {}
    for name, shape in merged.items():
        module, elements = name.rpartition(".")[0], prod(source[name])
        if elements > found.get(module, (0, 1.0))[0]:
            found[module] = (elements, prod(shape) / elements)
    return {module: ratio for module, (_, ratio) in found.items()}
