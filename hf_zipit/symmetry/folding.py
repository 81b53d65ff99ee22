"""Folding: a norm's scale and shift go into the linear layers that read its output, and the norm is left without.

LayerNorm and RMSNorm scale every unit by a number of its own, which no rotation survives: that is why the residual
stream of a trained model allows only permutations. But where nothing but linear layers reads the norm,

    W (s * n + b) + c  =  (W diag(s)) n + (W b + c),

the scale can be theirs, and what is left of the norm allows every orthogonal map (LayerNorm: those that keep the
vector of ones). See arXiv 2506.22712 and SliceGPT, arXiv 2401.15024. A reader without a bias cannot take the shift; it
then stays in the norm as b / s, a vector of the stream that moves with it.

In a post-LN model (BERT) the norm's output is the stream itself, so nothing can be folded. Whether something can is
seen in the traced graph, never told by the name of a class.

Invariant: a folded model computes what the model computes.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from hf_zipit.errors import ExpertError
from hf_zipit.symmetry.ops import module_of, op_name, shape_of
from hf_zipit.symmetry.spaces import Fold, Reader

SMALLEST_SCALE = 1e-4
"""A shift that stays is divided by its scale; relative to the largest, a smaller scale would lose its digits."""

PASSING = {
    "dropout", "feature_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "view",
    "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
}  # fmt: skip
"""Ops that keep the units on the last axis as they are, if that axis keeps its length."""

ALONG_ANOTHER = {"select": 1, "slice": 1, "narrow": 1, "mean": 1, "index_select": 1}
"""Ops that do so where they work along other axes, and which argument says along which."""


def find_folds(graph: fx.Graph, tensor_of: Mapping[fx.Node, str], model: nn.Module) -> Iterator[Fold]:
    """The scales of a graph that only linear layers read.

    Args:
        graph: of one exported forward pass.
        tensor_of: the parameters' and buffers' names, by placeholder.
        model: the model that was exported.
    """
    for node in graph.nodes:
        found = _affine(node, tensor_of)
        if found is None:
            continue
        scale, shift = found
        readers = _readers(node, tensor_of, model)
        alone = all(len(used.users) == 1 for used in (scale, shift) if used is not None)
        if alone and readers:
            yield Fold(tensor_of[scale], tensor_of[shift] if shift is not None else None, tuple(readers))


def _affine(node: fx.Node, tensor_of: Mapping[fx.Node, str]) -> tuple[fx.Node, fx.Node | None] | None:
    """Scale and shift of an op that multiplies the units on its last axis by a parameter, None for other ops."""
    if node.op != "call_function" or not hasattr(node.meta.get("val"), "shape"):
        return None
    name, args = op_name(node), list(node.args)
    if name in ("layer_norm", "rms_norm") and len(args) > 2 and args[2] in tensor_of:
        shift = args[3] if name == "layer_norm" and len(args) > 3 else None
        units = len(args[1]) == 1
        return (args[2], shift) if units and (shift is None or shift in tensor_of) else None
    if name == "mul" and len(args) == 2 and all(isinstance(arg, fx.Node) for arg in args):
        for scale, x in (args, args[::-1]):
            if scale in tensor_of and x not in tensor_of and shape_of(scale) == shape_of(node)[-1:] != []:
                return (scale, None) if shape_of(x) == shape_of(node) else None
    return None


def _readers(norm: fx.Node, tensor_of: Mapping[fx.Node, str], model: nn.Module) -> list[Reader]:
    """The linear layers that read a node; empty where something else does, or where one of them cannot be changed."""
    units = shape_of(norm)[-1]
    found: dict[str, Reader] = {}
    waiting = list(norm.users)
    passed = {norm}
    while waiting:
        node = waiting.pop()
        if node in passed:
            continue
        passed.add(node)
        if passes(node, passed, units):
            waiting += node.users
            continue
        reader = _reader(node, passed, tensor_of, model)
        if reader is None or reader.module in found:
            return []
        found[reader.module] = reader
    return list(found.values())


def passes(node: fx.Node, passed: Container[fx.Node], units: int) -> bool:
    """Whether the node's output holds the same units on its last axis, only fewer or other rows of them."""
    if node.op != "call_function" or not node.args or node.args[0] not in passed:
        return False
    source, out = (n.meta.get("val") for n in (node.args[0], node))
    if not hasattr(out, "shape") or not out.is_floating_point() or list(out.shape[-1:]) != [units]:
        return False
    name, last = op_name(node), source.dim() - 1
    if name in ALONG_ANOTHER:
        along = node.args[1] if len(node.args) > 1 else None
        along = along if isinstance(along, Sequence) else [along]
        return all(isinstance(dim, int) and dim % source.dim() != last for dim in along)
    if name == "index":
        indices = node.args[1]
        return len(indices) <= last or indices[last] is None
    return name in PASSING


def _reader(node: fx.Node, passed: set[fx.Node], tensor_of: Mapping[fx.Node, str], model: nn.Module) -> Reader | None:
    """The linear layer that an op is, with its parameters under the names of its own module."""
    name, args = (op_name(node) if node.op == "call_function" else ""), [*node.args, None]
    if name == "linear":
        x, weight, bias, axis = args[0], args[1], args[2], 1
    elif name == "addmm" and not node.kwargs:
        x, weight, bias, axis = args[1], args[2], args[0], 0
    else:
        return None
    if x not in passed or weight not in tensor_of or (bias is not None and bias not in tensor_of):
        return None
    # A layer that runs twice reads two norms. (A table may have the same weight: folding unties it.)
    path = module_of(node)
    calls = [user for user in weight.users if module_of(user) == path]
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    own = getattr(module, "weight", None)
    if len(calls) != 1 or own is None or own is not _tensor(model, tensor_of[weight]):
        return None
    return Reader(path, f"{path}.weight", None if bias is None else f"{path}.bias", axis)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold(model: Model, folds: Sequence[Fold], what: str = "the model") -> Model:
    """A copy of a model with its norms folded. It shares every tensor that does not change.

    Args:
        model: it is not changed. Where it is in half precision the copy is in float32, so that nothing is rounded.
        folds: of its spec.
        what: how to call it in an error.

    Raises:
        ExpertError: if a shift has to stay in a norm whose scale is too small to divide by.
    """
    tensors = [*model.parameters(), *model.buffers()]
    coarse = any(t.is_floating_point() and t.element_size() < 4 for t in tensors)
    folded = copy.deepcopy(model, {} if coarse else {id(tensor): tensor for tensor in tensors})
    folded = folded.float() if coarse else folded
    for norm in folds:
        scale = _tensor(folded, norm.weight).double()
        shift = torch.zeros_like(scale) if norm.bias is None else _tensor(folded, norm.bias).double()
        stays = any(reader.bias is None for reader in norm.readers)
        if stays and bool(shift.any()) and bool(scale.abs().min() < SMALLEST_SCALE * scale.abs().max()):
            raise ExpertError(
                f"{norm.weight} of {what} has a unit with a scale near zero, and {norm.readers[0].module} has no bias "
                "to take its shift: the norm cannot be folded; choose residual='match'"
            )
        for reader in norm.readers:
            weight = _tensor(folded, reader.weight).double()
            shape = [1, -1] if reader.axis == 1 else [-1, 1]
            _set(folded, reader.weight, weight * scale.reshape(shape))
            if not stays and norm.bias is not None:
                bias = _tensor(folded, str(reader.bias)).double()
                _set(folded, reader.bias, bias + weight.movedim(reader.axis, -1) @ shift)
        if norm.bias is not None:
            kept = torch.where(shift == 0, 0.0, shift / torch.where(scale == 0, 1.0, scale))
            _set(folded, norm.bias, kept if stays else torch.zeros_like(shift))
        _set(folded, norm.weight, torch.ones_like(scale))
    return folded


def _set(model: nn.Module, name: str | None, value: Tensor) -> None:
    """Give one module a parameter of its own, whoever else has the old one."""
    path, _, leaf = str(name).rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
