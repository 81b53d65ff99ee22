"""From a model to its `Trace`: export the forward pass, walk the graph, name what was found.

`torch.export` gives a flat ATen graph on fake tensors: no weight is copied and no arithmetic is done. The interpreter
walks it with the rules of `rules/`; `naming.py` names what it found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch.fx import config as fx_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from hf_zipit.adapters.fake_passes import KnownNumbers, quietly
from hf_zipit.adapters.signature import grids, packed
from hf_zipit.errors import SpecError
from hf_zipit.steady import forget
from hf_zipit.symmetry.folding import find_folds
from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.memory import Memory, trace_key
from hf_zipit.symmetry.naming import Naming
from hf_zipit.symmetry.ops import INTEGERS, MOST_INTEGERS, Value, op_name
from hf_zipit.symmetry.rules import PATTERNS, RULES
from hf_zipit.symmetry.spaces import Fold, Symmetry, Trace, products


class _Fields(nn.Module):
    """Returns the wanted output tensors of a model as a dict, whatever type the model returns."""

    def __init__(
        self, model: nn.Module, fields: Sequence[str] | None, known: Mapping[str, Tensor] | None = None
    ) -> None:
        """`known` are inputs that are always the same."""
        super().__init__()
        self.model = model
        self.fields = fields
        self.known = dict(known or {})

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return select_outputs(self.model(**packed({**inputs, **self.known})), self.fields)


def select_outputs(out: Any, fields: Sequence[str] | None) -> dict[str, Tensor]:
    """The output tensors that count: the named fields, else every tensor.

    Where some are logits, hidden states beside them do not count: what a detector answers are classes and boxes.
    """
    if isinstance(out, Tensor):
        return {"output": out}
    named = dict(out.items()) if isinstance(out, Mapping) else {str(i): x for i, x in enumerate(out)}
    found = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    if fields is not None:
        return {name: found[name] for name in fields if name in found}
    if any("logits" in name for name in found):
        return {name: x for name, x in found.items() if "hidden_state" not in name and x.is_floating_point()}
    return found


def export(model: nn.Module, inputs: Mapping[str, Tensor], fields: Sequence[str] | None) -> Any:
    """The exported program of one forward pass in eval mode, on fake tensors, without ops whose results nothing reads.

    (BART slices its embeddings only to ask for a shape.) Where the way through the model depends on what is in its
    inputs (Longformer asks whether any token attends globally), it is the one that these inputs take.

    Raises:
        SpecError: if `torch.export` cannot trace the model with these inputs, or the way through it depends on its
            weights.
    """
    training = {name: module.training for name, module in model.named_modules()}
    forget(model)
    model.eval()
    try:
        with torch.no_grad(), quietly(), experts_looked_up(model), without_stack_traces(), PlacesAsColumns():
            wanted = _Fields(model, fields).eval()
            try:
                if grids(inputs):
                    program = _with_grids(wanted, inputs)
                else:
                    program = torch.export.export(wanted, (), kwargs=dict(inputs), strict=False)
            except Exception as error:  # it says so in many ways
                if "data-dependent" not in str(error):
                    raise
                program = _along_the_inputs(wanted, inputs, error)
        program.graph.eliminate_dead_code()
        return program
    except Exception as error:  # torch.export raises many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError(
            f"{type(model).__name__} could not be traced with inputs {sorted(inputs)} ({first}); "
            "pass example inputs that its forward accepts, merge(..., example_inputs={...})"
        ) from error
    finally:
        forget(model)  # fake tensors
        for name, module in model.named_modules():  # some models exchange modules while they run (BigBird)
            module.training = training.get(name, module.training)


class PlacesAsColumns(TorchFunctionMode):
    """`nonzero(as_tuple=True)` as the columns of `nonzero()`: as one op, fake tensors with values lose its size."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.nonzero, Tensor.nonzero) and kwargs.get("as_tuple"):
            return args[0].nonzero().unbind(1)
        return function(*args, **kwargs)


def _with_grids(wanted: _Fields, inputs: Mapping[str, Tensor]) -> Any:
    """The exported program of a model for images that are cut by these very grids, which are no inputs of it."""
    known = grids(inputs)
    others = {name: x for name, x in inputs.items() if name not in known}
    with KnownNumbers():
        return torch.export.export(_Fields(wanted.model, wanted.fields, known).eval(), (), kwargs=others, strict=False)


def _along_the_inputs(wanted: _Fields, inputs: Mapping[str, Tensor], error: Exception) -> Any:
    """The exported program of the way that a model takes with these very inputs: its tensors keep their values.

    Raises:
        Exception: `error`, where the weights have a part in which way that is: others would take another.
    """
    try:
        with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
            program = torch.export.export(wanted, (), kwargs=dict(inputs), strict=False)
    except Exception:  # of a model without values, on the meta device
        raise error from None
    parameters = program.graph_signature.inputs_to_parameters
    weighed: set[fx.Node] = set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            inner = node.op == "placeholder" and module is not program.graph_module  # what goes in is not known
            read = not weighed.isdisjoint(node.all_input_nodes) and op_name(node) not in SIZES_ONLY
            if inner or node.name in parameters or read:
                weighed.add(node)
            if not weighed.isdisjoint(_decisive(node)):
                raise error
    return program


SIZES_ONLY = {"sym_size", "sym_numel", "sym_stride", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like",
              "ones_like", "full_like", "empty_like"}  # fmt: skip
"""Ops that read of a tensor how large it is, not what is in it."""


def _decisive(node: fx.Node) -> list[fx.Node]:
    """The arguments of an op on whose values, not only their sizes, it depends which way a model takes after it."""
    if op_name(node) == "index":
        indices = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
        return [index for index in indices if index.meta["val"].dtype in (torch.bool, torch.uint8)]  # type: ignore[union-attr]
    deciding = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return node.all_input_nodes if deciding.intersection(getattr(node.target, "tags", ())) else []


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Which line of the model's code made an op is of no use here, and looking it up takes a third of a trace."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


@contextmanager
def experts_looked_up(model: nn.Module) -> Iterator[None]:
    """Have the experts of a mixture looked up for every token, instead of the tokens sorted by expert.

    Of the ways in which `transformers` can run experts this is the one whose graph does not depend on the data; all of
    them compute the same.
    """
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    before = [(c, c._experts_implementation) for c in configs if getattr(c, "_experts_implementation", None)]
    try:
        for config, _ in before:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, implementation in reversed(before):
            config._experts_implementation = implementation


@dataclass(frozen=True)
class Exported:
    """What a walk reads of an exported program; the rest of it holds the model's weights."""

    graph: fx.Graph
    graph_module: fx.GraphModule
    graph_signature: Any
    call_spec: Any


EXPORTED: Memory[Exported] = Memory()


def _exported(model: nn.Module, inputs: Mapping[str, Tensor], fields: Sequence[str] | None) -> Exported:
    """The exported program of a model; the same with norms folded and without."""

    def make() -> Exported:
        program = export(model, inputs, fields)
        note_integers(program)
        return Exported(program.graph, program.graph_module, program.graph_signature, program.call_spec)

    values = [(n, x.tolist() if n in grids(inputs) else x) for n, x in inputs.items()]  # grids are a part of the graph
    shapes = [(n, (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x)) for n, x in values]
    return EXPORTED.get(trace_key(model, tuple(sorted(shapes)), tuple(fields or ()), fields is None), make)


def note_integers(program: Any) -> None:
    """Note at the nodes of constants what they hold, where it is a short list of integers: `x[:, [-2]]`."""
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        found = program.constants.get(lifted.get(node.name))
        if (
            isinstance(found, Tensor)
            and found.dtype == torch.int64
            and found.ndim == 1
            and len(found) <= MOST_INTEGERS
        ):
            node.meta[INTEGERS] = found.tolist()


def trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    towers: Sequence[Sequence[str]] = (),
    head: Sequence[str] = (),
    fields: Sequence[str] | None = None,
    features: Sequence[str] = (),
    folding: bool = False,
) -> Trace:
    """Infer a model's `MergeSpec`.

    Args:
        model: any module; its weights are not read.
        inputs: example keyword inputs. Sizes do not matter, but the batch should be larger than one.
        towers: chains of block paths, each in execution order.
        head: path prefixes of the task head.
        fields: output fields that count; see `select_outputs` for what None means.
        features: output fields that may change basis, because the merged model reads them through U_t.
        folding: whether to infer what holds once the norms are folded (`Trace.folds`). Norms whose space gains nothing
            by it are left as they are.

    Raises:
        SpecError: if the model cannot be traced.
    """
    program = _exported(model, inputs, fields)
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = program.graph.nodes
    tensor_of = {n: named[n.name].removeprefix("model.") for n in nodes if n.op == "placeholder" and n.name in named}
    folds = tuple(find_folds(program.graph, tensor_of, model)) if folding else ()
    while True:
        try:
            found = _walk(program, tensor_of, model, inputs, towers, head, features, folds)
        except GuardOnDataDependentSymNode as error:
            raise SpecError(
                f"{type(model).__name__} cannot be traced: how large its tensors are depends on what is in them "
                f"({str(error).splitlines()[0]}); trace another class of this family"
            ) from error
        useful = tuple(norm for norm in folds if _rotates(norm, found))
        if useful == folds:
            return replace(found, folds=folds)
        folds = useful


def _rotates(norm: Fold, found: Trace) -> bool:
    """Whether the space that a norm runs over allows more than permutations; of a direct sum, all of its terms."""
    labels = [found.axes[reader.weight][reader.axis] for reader in norm.readers]
    inner = [product[-1] for label in labels if label for product in products(label)]
    return all(labels) and all(found.spaces[factor.space].symmetry > Symmetry.PERMUTATION for factor in inner)  # type: ignore[union-attr]


def _walk(
    program: Any,
    tensor_of: Mapping[fx.Node, str],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    towers: Sequence[Sequence[str]],
    head: Sequence[str],
    features: Sequence[str],
    folds: Sequence[Fold],
) -> Trace:
    """What the graph says, the scales of `folds` being ones."""
    run = Interpreter(model, towers, head, RULES, PATTERNS)
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    ones = {norm.weight for norm in folds}
    values: list[Any] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        tensor = tensor_of.get(node)
        reason = f"the model's input {node.name}" if tensor is None and node.name not in constants else "a constant"
        values.append(run.bind_ones(node, tensor) if tensor in ones else run.bind(node, tensor, reason))
    results = run.run(program.graph, values, program.graph_module)
    names = list(program.call_spec.out_spec.context)
    outputs = dict(zip(names, [r for r in results if isinstance(r, Value)], strict=True))
    run.fix_numbers(results, "the model's output")
    for name, value in outputs.items():
        for i, axis in enumerate(value.axes):
            if name not in features or i == 0 or len(run.atoms.products(axis)) > 1:
                run.atoms.restrict(axis, Symmetry.FIXED, f"the model's output {name}")
    batch = next(iter(inputs.values())).shape[0]
    return Naming(run, model).spec(towers, head, outputs, samples=batch)
