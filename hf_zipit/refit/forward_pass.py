"""The exported forward pass of a model: its ops without its weights.

It is remembered, for models that are alike and inputs of the same shapes have the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import config as fx_config

from hf_zipit.errors import SpecError
from hf_zipit.symmetry.memory import Memory, trace_key
from hf_zipit.symmetry.ops import is_in_place, module_stack, op_name
from hf_zipit.symmetry.trace import export

VIEWS = {"view", "reshape", "slice", "select", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "narrow"}
"""Ops whose result shares memory with their input, so that writing into it writes into the input."""


@dataclass(frozen=True)
class ForwardPass:
    """The ops of a forward pass for inputs of one shape. No value is ever written into.

    Attributes:
        nodes: in the order they run.
        tensors: by graph input the parameter or buffer that it is, by the name under which the graph reads it.
        constants: by graph input a tensor that the model's code makes.
        outputs: by output field the node that makes it.
        module: has what `get_attr` nodes name.
    """

    nodes: list[fx.Node]
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]
    outputs: Mapping[str, fx.Node]
    module: fx.GraphModule


FORWARD_PASSES: Memory[ForwardPass] = Memory()


def forward_pass(model: nn.Module, inputs: Mapping[str, Tensor], fields: tuple[str, ...] | None) -> ForwardPass:
    """The forward pass of a model; `fields` are the outputs that count.

    Raises:
        SpecError: if the model cannot be traced, or writes into a part of a tensor that is read as a whole later.
    """
    kinds = tuple((x.dtype, x.device) for x in (*model.parameters(), *model.buffers()))
    shapes = tuple(sorted((name, _shape(x)) for name, x in inputs.items()))
    return FORWARD_PASSES.get(trace_key(model, kinds, shapes, fields), lambda: _made(model, inputs, fields))


def _shape(x: Any) -> Hashable:
    """What a trace knows of an input: of a switch, such as `use_cache`, all."""
    return (tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else repr(x)


def _made(model: nn.Module, inputs: Mapping[str, Tensor], fields: tuple[str, ...] | None) -> ForwardPass:
    with without_stack_traces():
        exported = export(model, inputs, fields)
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    output = next(node for node in exported.graph.nodes if node.op == "output")
    nodes = [node for node in exported.graph.nodes if node.op in ("call_function", "get_attr")]
    _read_what_was_written(nodes)
    return ForwardPass(
        nodes,
        {name: tensor.removeprefix("model.") for name, tensor in named.items()},
        {name: exported.constants[constant] for name, constant in constants.items()},
        dict(zip(list(exported.call_spec.out_spec.context), output.args[0], strict=True)),
        exported.graph_module,
    )


def _read_what_was_written(nodes: list[fx.Node]) -> None:
    """After `x.add_(y)` every later reader of x reads the result instead."""
    position = {node: i for i, node in enumerate(nodes)}
    for node in filter(is_in_place, nodes):
        for base in written_through(node):
            later = [user for user in base.users if position.get(user, len(nodes)) > position[node]]
            if later and base is not node.args[0]:
                raise SpecError(
                    f"{node.target} in {module_of(node)} writes into a part of a tensor, which refit cannot follow"
                )
            for user in later:
                user.replace_input_with(base, node)


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Which line of the model's code made an op is of no use here, and looking it up takes a third of a trace."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that an op runs in."""
    return (module_stack(node) or ("",))[-1] or "the model itself"


def written_through(node: fx.Node) -> Iterator[fx.Node]:
    """What an in-place op writes into: its argument, and what that is a view of."""
    base = node.args[0]
    while isinstance(base, fx.Node):
        yield base
        base = base.args[0] if base.op == "call_function" and op_name(base) in VIEWS else None
