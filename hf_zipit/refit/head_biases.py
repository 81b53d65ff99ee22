"""What is added to the logits of each head, where an attention layer gets more and narrower heads.

Relative positions have a table with one number for every head (T5, MPNet, Swin, BEiT). Where each expert's heads stay
heads of their own, each keeps its own column, and the table becomes as wide as there are heads. Layers that share a
table are cut together or not at all, as the first of them is, and so are those that share a bias that the class makes
of zeros.

How the ops that make the biases change with the number of heads is read off a trace of a model with as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_zipit.maps.transform import features_to_merged
from hf_zipit.refit.attention import Attention, bias_of, differs_by_head
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.program import Arguments, Program, resized_copy
from hf_zipit.symmetry.ops import shape_of
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec


@dataclass(frozen=True, eq=False)
class HeadBiases:
    """Biases that some attention layers read, head by head.

    Attributes:
        layers: those that read them.
        tables: the tensors that they are made of, by name the axis of the heads.
        ops: those that make them, in the order they run, with their arguments for `count` heads.
        count: how many heads there are when the layers are cut.
    """

    layers: tuple[Attention, ...]
    tables: Mapping[str, int]
    ops: Mapping[fx.Node, Arguments]
    count: int

    def needed(self, program: Program) -> set[fx.Node]:
        """The values of the ops before the first layer, and those that they read: they are made again if it is cut."""
        first = program.position[self.layers[0].node]
        return {used for op in self.ops if program.position[op] < first for used in (op, *op.all_input_nodes)}

    def disagreement(self, fit: Fit) -> tuple[float, float]:
        """What the mean of the biases of heads that are paired loses, and their energy: variances, summed over heads,
        on average over the experts.
        """
        lost = energy = 0.0
        for name, axis in self.tables.items():
            label, parts = fit.spec.axes[name][axis], []
            for t in fit.values.experts:
                table = fit.values.tensors[t][name].to(fit.home, torch.float64)
                parts.append(features_to_merged(table, axis, label, fit.alignment, fit.spec, t).movedim(axis, 0))
            own = torch.stack(parts).flatten(2)
            lost += float((own - own.mean(0)).var(-1, correction=0).sum()) / len(parts)
            energy += float(own.var(-1, correction=0).sum()) / len(parts)
        return lost, energy

    def split(self, fit: Fit) -> None:
        """Give each expert's heads their own columns in the merged model, and make the biases again."""
        for name, axis in self.tables.items():
            own = torch.cat([fit.values.tensors[t][name] for t in fit.values.experts], axis)
            fit.values.merged[name] = with_heads(own, axis, self.count)
        fit.values.program.adopt(self.ops)
        fit.values.run_again(self.ops, self.layers[0].node)


def with_heads(table: Tensor, axis: int, count: int) -> Tensor:
    """A table for `count` heads, zeros for those beyond the ones that it has."""
    more = list(table.shape)
    more[axis] = count - table.shape[axis]
    return torch.cat([table, table.new_zeros(more)], axis)


def find_biases(
    program: Program,
    widths: Mapping[Attention, int],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    fields: Sequence[str] | None,
    spec: MergeSpec,
) -> dict[Attention, HeadBiases]:
    """The biases of layers whose heads each have one; none of those that share a table with one where these cannot
    become more.

    Args:
        program: the forward pass.
        widths: the layers, and the width of a narrower head of each.
        model: an expert.
        inputs: what the program was traced with.
        fields: the outputs that count.
        spec: the spaces.
    """
    tables = {layer: found for layer in widths if (found := _tables(program, layer, spec)) is not None}
    if not tables:
        return {}
    own = model_tensors(model)
    counts = {layer: layer.heads * layer.width // widths[layer] for layer in tables}
    shapes = {}
    for layer, axes in tables.items():
        for name, axis in axes.items():
            shapes[name] = list(own[name].shape)
            shapes[name][axis] = counts[layer]
    cuts = {layer.module: widths[layer] for layer in tables if layer.module is not None}
    try:
        cut = Program(resized_copy(model, shapes, cuts), inputs, fields)  # type: ignore[arg-type]
        arguments = program.arguments_in(cut)
    except Exception:  # a model's own code may raise anything where a shape is not what it expects
        groups = _sharing(tables, {layer: set(_made_of(program, layer)) for layer in tables}, program)
        if len(groups) == 1:
            return {}
        apart = [find_biases(program, {n: widths[n] for n in group}, model, inputs, fields, spec) for group in groups]
        return {layer: biases for found in apart for layer, biases in found.items()}  # what fails does so alone
    made_by = {layer: _ops(program, layer, tables[layer], arguments) for layer in tables}
    found = {}
    for layers in _sharing(tables, made_by, program):
        ops = {op: arguments[op] for layer in layers for op in made_by[layer]}
        alone = {*ops, *(layer.node for layer in layers)}
        whole = len({counts[layer] for layer in layers}) == 1 and all(alone.issuperset(op.users) for op in ops)
        if whole:
            axes = {name: axis for layer in layers for name, axis in tables[layer].items()}
            in_order = {op: ops[op] for op in sorted(ops, key=program.position.__getitem__)}
            biases = HeadBiases(tuple(layers), axes, in_order, counts[layers[0]])
            found |= dict.fromkeys(layers, biases)
    return found


def _tables(program: Program, layer: Attention, spec: MergeSpec) -> dict[str, int] | None:
    """The tensors that a layer's biases are made of, by name the axis of the heads; None where there are none that
    differ by head, or they are made of anything else that was learnt."""
    bias = bias_of(layer.node)
    if bias is None or layer.logits != "plain" or not differs_by_head(bias) or shape_of(bias)[-3] != layer.heads:
        return None
    heads, found = layer.query.label[:-1], dict[str, int]()
    for node in program.before([bias]):
        name = program.tensor_of(node)
        if name is None or not node.meta["val"].is_floating_point():
            continue
        axes = [axis for axis, label in enumerate(spec.axes.get(name, ())) if label == heads]
        if len(axes) != 1 or node.meta["val"].dim() < 2:
            return None
        found[name] = axes[0]
    return found


def _ops(
    program: Program, layer: Attention, tables: Mapping[str, int], arguments: Mapping[fx.Node, Arguments]
) -> set[fx.Node]:
    """The ops of a layer's biases that depend on the number of heads."""
    every = _made_of(program, layer)
    found = {node for node in every if _sizes(arguments[node]) != _sizes(program.arguments(node))}
    for node in sorted(every, key=program.position.__getitem__):
        if any(used in found or program.tensor_of(used) in tables for used in node.all_input_nodes):
            found.add(node)
    return found


def _made_of(program: Program, layer: Attention) -> list[fx.Node]:
    """The ops that a layer's biases depend on, the last one first."""
    bias = bias_of(layer.node)
    assert bias is not None
    return [node for node in program.before([bias]) if node in program.position]


def _sizes(arguments: Arguments) -> Any:
    """The numbers and settings among an op's arguments."""
    return fx.map_arg((arguments.args, dict(arguments.kwargs)), lambda node: None)


def _sharing(
    tables: Mapping[Attention, Mapping[str, int]], made_by: Mapping[Attention, set[fx.Node]], program: Program
) -> list[list[Attention]]:
    """Layers in the order they run, together where they share an op or a table."""
    groups: list[tuple[list[Attention], set[Any]]] = []
    for layer in sorted(tables, key=lambda layer: program.position[layer.node]):
        layers, reads = [layer], {*tables[layer], *made_by[layer]}
        apart = []
        for others, theirs in groups:
            if theirs.isdisjoint(reads):
                apart.append((others, theirs))
            else:
                layers, reads = [*others, *layers], reads | theirs
        groups = [*apart, (layers, reads)]
    return [layers for layers, _ in groups]
