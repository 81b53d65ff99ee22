"""More and narrower heads: which attention layers of an architecture can have them.

Two experts' heads weigh positions differently, and no mean of the two is near both. But what is in one head is of low
rank: T experts' heads side by side, each with a share of head_dim, take no more parameters or operations than one
expert's heads, and lose little. Whether a layer can be cut so depends on its class, and is seen in the program of a
model that was cut: its attention op has the new heads, and all other ops are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from hf_zipit.modeling.head_dims import head_dim_name
from hf_zipit.refit.attention import Attention, heads_and_width
from hf_zipit.refit.graph import Program
from hf_zipit.refit.variants import variant


def narrower(width: int, experts: int) -> int | None:
    """The greatest divisor of a head's width of which every expert's head can have one; None if there is none."""
    return next((dim for dim in range(width // experts, 0, -1) if width % dim == 0), None)


def split_ops(
    program: Program,
    layers: Iterable[Attention],
    model: nn.Module,
    shapes: Mapping[str, list[int]],
    experts: int,
    export: Any,
) -> dict[fx.Node, fx.Node]:
    """For every op of the layers that can be cut, the op of the cut model; empty where none can.

    Args:
        program: the forward pass of an expert.
        layers: its attention layers.
        model: an expert.
        shapes: the merged model's tensors that have other shapes.
        experts: how many heads are to take the place of one.
        export: makes the program of a model.
    """
    wanted = {}
    for layer in layers:
        dim = narrower(layer.width, experts)
        if layer.module is not None and dim is not None and head_dim_name(model.get_submodule(layer.module)):
            wanted[layer.module] = dim
    if not wanted:
        return {}
    try:
        other = export(variant(model, shapes, wanted))
        twins = program.twins(other)
    except Exception:  # a model's own code may raise anything where a shape is not what it expects
        return {}
    within = {node for layer in layers for node in layer.between}
    if any(_shape(program.merged(node)) != _shape(twins[node]) for node in program.nodes if node not in within):
        return {}  # as where every head has a mask of its own
    found: dict[fx.Node, fx.Node] = {}
    for layer in layers:
        dim = wanted.get(layer.module or "")
        if dim and heads_and_width(twins[layer.node]) == (layer.heads * (layer.width // dim), dim):
            found |= {node: twins[node] for node in layer.between}
    return found


def _shape(node: fx.Node) -> Any:
    """Of an op's value; None where that is no tensor."""
    return getattr(node.meta.get("val"), "shape", None)
