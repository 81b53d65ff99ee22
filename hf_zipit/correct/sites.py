"""Sites: where the units of a trunk can be measured and corrected, with the spaces that they belong to.

Two kinds: the outputs of layers (their label is that of the weight's output axis), and the inputs of blocks, where the
residual stream passes from one block to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_zipit.planning.cut import Cut
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key


@dataclass(frozen=True)
class Site:
    """One axis of a module's first input or of its output.

    Attributes:
        module: its path in the source model.
        where: `"input"` or `"output"`.
        axis: the axis of the units.
        label: their spaces, as a vector axis.
    """

    module: str
    where: str
    axis: int
    label: AxisLabel


def layers(model: nn.Module, planned: Plan) -> list[Site]:
    """The outputs of the trunk's layers, in execution order.

    A convolution without bias right before its BatchNorm is left out: the norm's output is corrected instead.
    """
    spec, trunk = planned.spec, planned.cut.trunk
    found: list[Site] = []
    for path in spec.modules:
        name = f"{path}.weight"
        if name not in trunk or name not in spec.axes:
            continue
        module = model.get_submodule(path)
        axes = output_axes(module)
        if axes is None:
            continue
        site = Site(path, "output", axes[1], spec.output_label(name, axes[0]))
        if is_batch_norm(module) and found and found[-1].label == site.label:
            before = model.get_submodule(found[-1].module)
            if isinstance(before, nn.modules.conv._ConvNd) and before.bias is None:
                found.pop()
        found.append(site)
    return found


def output_axes(module: nn.Module) -> tuple[int, int] | None:
    """Of a layer, the weight's axis that is the output's, and the output's axis that it is; None for other modules."""
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return 0, 1
    if isinstance(module, nn.Linear):
        return 0, -1
    if isinstance(module, (Conv1D, nn.Embedding)):
        return 1, -1
    if is_batch_norm(module) or isinstance(module, nn.GroupNorm):
        return 0, 1
    # A subclass of LayerNorm may have its units on another axis, as ConvNeXt's does.
    plain = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return (0, -1) if plain or type(module).__name__.endswith("RMSNorm") else None


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def block_inputs(spec: MergeSpec, cut: Cut) -> Iterator[Site]:
    """The first inputs of the trunk's blocks, where the spec knows which value it is."""
    numbers = {}
    for block in spec.blocks:
        numbers[block.path] = sum(other.tower == block.tower for other in spec.blocks[: len(numbers)])
        if numbers[block.path] >= cut.blocks[block.tower]:
            continue
        values: dict[str, tuple[AxisLabel, ...]] = {}
        for crossing in spec.crossings:
            moving = any(spec.movable(name) for label in crossing.axes for name in product_key(label))
            if block.path in crossing.stack and moving:
                values[crossing.value] = crossing.axes
        if len(values) != 1:
            continue
        (labels,) = values.values()
        axes = [axis for axis, label in enumerate(labels) if any(spec.movable(f.space) for f in label)]
        if len(axes) == 1:
            yield Site(block.path, "input", axes[0], labels[axes[0]])
