"""Several ops that are one linear map or one attention, made one op of a graph, so that they are found as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from hf_zipit.symmetry.ops import is_in_place, op_name

FLAT = {"view", "reshape"}
"""Ops that make rows of positions, and positions of rows."""

TURNING = {"t", "numpy_T", "transpose", "permute"}
"""Ops that turn a matrix."""


def turned_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map whose weight is `[inputs, outputs]`."""
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def routed_linear(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """What rows `[rows, inputs]` become, each by the one of several linear maps `[maps, outputs, inputs]` it chose."""
    out = x.new_empty(len(x), weight.shape[1])
    for number in chosen.unique().tolist():
        rows = chosen == number
        out[rows] = x[rows] @ weight[number].mT
    return out


def rewrite(graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
    """Make one op of several, wherever that is known, in place; `constants` by the names of the graph's inputs."""
    for node in list(graph.nodes):
        if op_name(node) == "_assert_tensor_metadata":  # reads a value and makes none
            graph.erase_node(node)
    linear_maps_of_rows(graph)
    products_with_turned_weights(graph)
    linear_maps_by_number(graph)
    parts_by_number(graph, constants)
    attention_step_by_step(graph)


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


def parts_by_number(graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
    """`x[..., [-2], :]`, where the numbers are known and lie side by side, is a slice (Falcon's keys and values)."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != "index" or any(map(is_in_place, node.users)):
            continue  # a slice would be no copy
        x, numbers = node.args
        axis = next((axis for axis, own in enumerate(numbers) if own is not None), 0)
        source = numbers[axis] if sum(own is not None for own in numbers) == 1 else None
        if isinstance(source, fx.Node) and op_name(source) == "lift_fresh_copy":
            source = source.args[0]
        found = constants.get(source.name) if isinstance(source, fx.Node) else None
        if found is None or found.dtype != torch.int64 or found.dim() != 1 or not len(found):
            continue
        first = int(found[0]) % x.meta["val"].shape[axis]
        if torch.equal(found - found[0], torch.arange(len(found))) and (found[0] >= 0 or found[-1] < 0):
            _replace(graph, node, torch.ops.aten.slice.Tensor, (x, axis, first, first + len(found)), ())


def attention_step_by_step(graph: fx.Graph) -> None:
    """`softmax(q k^T * scale + bias) v` is one op, the one that torch has for it."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) not in ("softmax", "_softmax") or node.args[1] not in (-1, 3):
            continue
        whole, passed = _values_behind(node)
        found = _logits_before(node.args[0])  # type: ignore[arg-type]
        if whole is None or found is None:
            continue
        query, key, scale, biases, steps = found
        value = whole.args[1]
        flat = len(query.meta["val"].shape) == 3
        heads = [with_heads(x) for x in (query, key, value)] if flat else [query, key, value]  # type: ignore[list-item]
        if any(x is None for x in heads) or any(len(x.meta["val"].shape) != 4 for x in heads):  # type: ignore[union-attr]
            continue
        with graph.inserting_before(whole):
            mask = None
            for bias in biases:
                bias = _bias_of_heads(graph, bias, heads[0]) if flat else bias  # type: ignore[arg-type]
                mask = bias if mask is None else _call(graph, torch.ops.aten.add.Tensor, mask, bias)
            made = graph.call_function(
                torch.ops.aten.scaled_dot_product_attention.default,
                tuple(heads) if mask is None else (*heads, mask),  # type: ignore[arg-type]
                {"scale": scale},
            )
            made.meta = {**whole.meta}
            if flat:
                sizes = (*heads[0].meta["val"].shape[:3], value.meta["val"].shape[-1])  # type: ignore[union-attr]
                made.meta["val"] = whole.meta["val"].reshape(sizes)
                made = _call(graph, torch.ops.aten.view.default, made, [-1, *whole.meta["val"].shape[1:]])
        whole.replace_all_uses_with(made)
        for old in dict.fromkeys((whole, *passed, node, *steps, *((query, key, value) if flat else ()))):
            if not old.users:
                graph.erase_node(old)


def _values_behind(node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The product of attention's weights and values, and the ops on the way to it, the last one first."""
    passed: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) in ("matmul", "bmm") and user.args[0] is node:
            return user, passed
        if op_name(user) not in PASSING and not _moves_heads(user):
            break
        passed.insert(0, user)
        node = user
    return None, passed


PASSING = {"dropout", "to", "_to_copy", "contiguous", "clone", "detach", "alias"}
"""Ops that pass weights on."""


def _moves_heads(node: fx.Node) -> bool:
    """Whether an op puts heads beside samples `[samples * heads, positions, positions]`, or on their own axis."""
    if op_name(node) not in FLAT:
        return False
    before, after = (list(x.meta["val"].shape) for x in (node.args[0], node))  # type: ignore[union-attr]
    return {len(before), len(after)} == {3, 4} and before[-2:] == after[-2:]


def _logits_before(node: fx.Node) -> tuple[fx.Node, fx.Node, float, list[fx.Node], list[fx.Node]] | None:
    """Queries, keys, the scale of their product, what is added to it, and the ops in between, the last one first."""
    scale, biases, steps = 1.0, list[fx.Node](), list[fx.Node]()
    while len(node.users) == 1:
        steps.append(node)
        name, args = op_name(node), node.args
        if name in ("matmul", "bmm"):
            return _factors(*args[:2], scale, biases, steps)  # type: ignore[misc]
        if name == "baddbmm" and node.kwargs.get("beta", 1) == 1 and scale == 1.0:
            biases.append(args[0])  # type: ignore[arg-type]
            return _factors(*args[1:3], float(node.kwargs.get("alpha", 1)), biases, steps)  # type: ignore[misc,arg-type]
        if name == "add" and scale == 1.0 and len(args) == 2 and not node.kwargs and isinstance(args[1], fx.Node):
            product = next((x for x in args if _leads_to_a_product(x)), None)
            if product is None:
                return None
            biases.append(args[1] if product is args[0] else args[0])  # type: ignore[arg-type]
            node = product
        elif name in ("mul", "div") and isinstance(args[1], (int, float)) and args[1]:
            scale = scale * args[1] if name == "mul" else scale / args[1]
            node = args[0]  # type: ignore[assignment]
        elif name in PASSING or _moves_heads(node):
            node = args[0]  # type: ignore[assignment]
        else:
            break
    return None


def _leads_to_a_product(node: fx.Node) -> bool:
    """Whether a summand is a product of matrices that nothing else reads, but for scales and further summands."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        name = op_name(node)
        if name in ("matmul", "bmm", "baddbmm"):
            return True
        if name == "add" and isinstance(node.args[1], fx.Node):
            return any(_leads_to_a_product(x) for x in node.args)  # type: ignore[arg-type]
        if name not in PASSING | {"mul", "div"} and not _moves_heads(node):
            break
        node = node.args[0]  # type: ignore[assignment]
    return False


def _factors(
    query: fx.Node, key: fx.Node, scale: float, biases: list[fx.Node], steps: list[fx.Node]
) -> tuple[fx.Node, fx.Node, float, list[fx.Node], list[fx.Node]] | None:
    """The queries and keys of a product, either of which may be scaled by a number."""
    keys = []
    while isinstance(key, fx.Node) and op_name(key) in {"div", "mul", *PASSING}:
        if op_name(key) in ("div", "mul"):
            number = key.args[1]
            if not isinstance(number, (int, float)):
                return None
            scale = scale * number if op_name(key) == "mul" else scale / number
        keys.append(key)
        key = key.args[0]
    if not isinstance(key, fx.Node) or op_name(key) != "transpose":
        return None
    last = len(key.meta["val"].shape)
    turned = {axis % last for axis in key.args[1:3]} == {last - 1, last - 2}  # type: ignore[operator]
    return (query, key.args[0], scale, biases, [*steps, *keys, key]) if turned else None  # type: ignore[return-value]


def with_heads(node: fx.Node) -> fx.Node | None:
    """Heads of samples `[samples, heads, positions, units]`, of which a value has both side by side."""
    source = node.args[0] if node.op == "call_function" and op_name(node) in FLAT else None
    if not isinstance(source, fx.Node) or len(source.meta["val"].shape) != 4:
        return None
    samples, heads, *rest = source.meta["val"].shape
    return source if list(node.meta["val"].shape) == [samples * heads, *rest] else None


def _bias_of_heads(graph: fx.Graph, bias: fx.Node, query: fx.Node) -> fx.Node:
    """What is added to heads of samples side by side, `[samples, heads, positions, positions]`."""
    shape = bias.meta["val"].shape
    if len(shape) != 3 or shape[0] == 1:
        return bias
    return _call(graph, torch.ops.aten.view.default, bias, [*query.meta["val"].shape[:2], *shape[1:]])


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new op, with the value that it has in a trace."""
    made = graph.call_function(target, args)
    made.meta = {"val": target(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in args))}
    return made


def _replace(graph: fx.Graph, whole: fx.Node, target: object, arguments: tuple, olds: tuple[fx.Node, ...]) -> None:
    """Put one op in the place of several, of which `whole` puts out the result."""
    with graph.inserting_before(whole):
        made = graph.call_function(target, arguments)  # type: ignore[arg-type]
    made.meta = {**whole.meta}
    whole.replace_all_uses_with(made)
    for old in dict.fromkeys((whole, *olds)):
        if not old.users:
            graph.erase_node(old)
