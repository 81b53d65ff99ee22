"""Several ops that are one linear map or one attention, made one op of a graph, so that they are found as such."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from hf_zipit.symmetry.ops import op_name

FLAT = {"view", "reshape"}
"""Ops that make rows of positions, and positions of rows."""

TURNING = {"t", "numpy_T", "transpose", "permute"}
"""Ops that turn a matrix."""


def turned_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map whose weight is `[inputs, outputs]`."""
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def routed_linear(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """What rows `[rows, inputs]` become by one of several linear maps `[maps, outputs, inputs]` each: `chosen` says."""
    out = x.new_empty(len(x), weight.shape[1])
    for number in chosen.unique().tolist():
        rows = chosen == number
        out[rows] = x[rows] @ weight[number].mT
    return out


def rewrite(graph: fx.Graph) -> None:
    """Make one op of several, wherever that is known, in place."""
    linear_maps_of_rows(graph)
    products_with_turned_weights(graph)
    linear_maps_by_number(graph)


def linear_maps_of_rows(graph: fx.Graph) -> None:
    """`view(addmm(bias, view(x, [-1, d]), weight), [..., k])`, transformers' Conv1D, is one op: `turned_linear`."""
    for node in list(graph.nodes):
        rows = node.args[1] if node.op == "call_function" and op_name(node) == "addmm" and not node.kwargs else None
        whole = next(iter(node.users), None)
        if not isinstance(rows, fx.Node) or op_name(rows) not in FLAT or whole is None or len(node.users) != 1:
            continue
        bias, _, weight = node.args
        x = rows.args[0]
        before, flat, made, after = (list(value.meta["val"].shape) for value in (x, rows, node, whole))
        if op_name(whole) not in FLAT or after != [*before[:-1], made[-1]] or before[-1:] != flat[1:]:
            continue
        _replace(graph, whole, turned_linear, (x, weight, bias), (node, rows))


def products_with_turned_weights(graph: fx.Graph) -> None:
    """`matmul(x, weight.T)` is a linear map, and what is added to it right behind its bias."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in ("matmul", "mm"):
            continue
        x, turned = node.args
        if not isinstance(turned, fx.Node) or op_name(turned) not in TURNING:
            continue
        weight = turned.args[0]
        if weight.op != "placeholder" or weight.meta["val"].dim() != 2:  # type: ignore[union-attr]
            continue
        sum_ = next(iter(node.users), None)
        bias = None
        if sum_ is not None and len(node.users) == 1 and op_name(sum_) == "add" and not sum_.kwargs:
            bias = next((y for y in sum_.args if y is not node), None)
            vector = isinstance(bias, fx.Node) and bias.op == "placeholder"
            if not vector or list(bias.meta["val"].shape) != list(node.meta["val"].shape[-1:]):  # type: ignore[union-attr]
                bias = None
        whole = node if bias is None else sum_
        arguments = (x, weight) if bias is None else (x, weight, bias)
        _replace(graph, whole, torch.ops.aten.linear.default, arguments, (node, turned))  # type: ignore[arg-type]


def linear_maps_by_number(graph: fx.Graph) -> None:
    """`squeeze(bmm(weights[numbers], unsqueeze(x)))` is one op: `routed_linear`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != "bmm":
            continue
        looked_up, column = node.args
        whole = next(iter(node.users), None)
        if op_name(looked_up) != "index" or op_name(column) != "unsqueeze" or column.args[1] != -1:  # type: ignore[arg-type,union-attr]
            continue
        weight, numbers = looked_up.args  # type: ignore[union-attr]
        if len(numbers) != 1 or weight.meta["val"].dim() != 3 or whole is None or len(node.users) != 1:  # type: ignore[arg-type,union-attr]
            continue
        if op_name(whole) == "squeeze" and tuple(whole.args[1:]) == (-1,):
            _replace(graph, whole, routed_linear, (column.args[0], weight, numbers[0]), (node, looked_up, column))  # type: ignore[union-attr,index,arg-type]


def _replace(graph: fx.Graph, whole: fx.Node, target: object, arguments: tuple, olds: tuple[fx.Node, ...]) -> None:
    """Put one op in the place of several, of which `whole` puts out the result."""
    with graph.inserting_before(whole):
        made = graph.call_function(target, arguments)  # type: ignore[arg-type]
    made.meta = {**whole.meta}
    whole.replace_all_uses_with(made)
    for old in dict.fromkeys((whole, *olds)):
        if not old.users:
            graph.erase_node(old)
