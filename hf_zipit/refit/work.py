"""How many operations a forward pass and a refit take, counted in the exported forward pass before anything is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from torch import fx, nn

from hf_zipit.adapters import adapter_for, example_inputs
from hf_zipit.config import RefitConfig
from hf_zipit.planning.cut import tower_lengths
from hf_zipit.planning.plan import Plan
from hf_zipit.refit import answer_refinement, attention_refinement, shared_refinement, unit_refinement
from hf_zipit.refit.mlp_solver import ROWS
from hf_zipit.refit.mlps import find_mlps
from hf_zipit.refit.normed_writers import with_branch_norms
from hf_zipit.refit.positions import NEARLY_ALL
from hf_zipit.refit.program import Program
from hf_zipit.refit.rewrites import turned_linear
from hf_zipit.refit.shared_refinement import recurring, rounds_of
from hf_zipit.refit.solvable import RefitSite, find_shared, find_sites
from hf_zipit.refit.stage import BASIS_ROWS
from hf_zipit.refit.steps import HELD_OUT, SAMPLES
from hf_zipit.symmetry.ops import op_name, shape_of

PRODUCTS = {"matmul": 1, "bmm": 1, "mm": 1, "addmm": 2, "baddbmm": 2}
"""Products of matrices, and which argument is the right one."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations: in float32, and in float64."""

    single: float = 0.0
    double: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.single + other.single, self.double + other.double)

    def times(self, factor: float) -> Work:
        return Work(factor * self.single, factor * self.double)


@dataclass(frozen=True)
class WorkLayer:
    """A site of the trunk: how many rows a sample gives it, and how wide it is."""

    site: RefitSite
    rows: float
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ForwardWork:
    """What a forward pass of one sample takes, of inputs of the traced shape.

    Attributes:
        forward: the operations of matrix products, of one expert.
        attention: those of them that weigh positions; rounds: those of layers that run again and again.
        layers: of the trunk.
        mlps: by hidden width, once for each of those whose units the refit chooses.
        stream: float32 bytes of the widest value that layers add to; widest: of the widest value of a layer.
    """

    forward: float
    attention: float
    rounds: float
    layers: tuple[WorkLayer, ...]
    mlps: tuple[tuple[WorkLayer, ...], ...]
    stream: float
    widest: float


def counted(planned: Plan) -> ForwardWork:
    """See `ForwardWork`; nothing is run, and no weight is read."""
    model, spec, trunk = planned.model, planned.spec, planned.cut.trunk
    inputs = example_inputs(model)
    program = Program(model, inputs, adapter_for(model).outputs(model), trunk, device="meta")
    samples = len(next(iter(inputs.values())))
    sites = with_branch_norms(program, find_sites(program, trunk, spec.head))
    layers = {node: _layer(site, samples) for node, site in sites.items() if site.kind in ("linear", "conv")}
    mlps = [tuple(layers[site.node] for site in (*mlp.writers, mlp.reader)) for mlp in find_mlps(program, sites, spec)]
    again = recurring(program, find_shared(program, trunk, spec.head), sites.values())
    weighing = (node for node in program.nodes if op_name(node) == "scaled_dot_product_attention")
    attention = sum(map(_operations, weighing))
    return ForwardWork(
        forward=_all_operations(program) / samples,
        attention=attention / samples,
        rounds=sum(map(_operations, rounds_of(program, again))) / samples,
        layers=tuple(layers.values()),
        mlps=tuple(mlps),
        stream=_bytes(site.aim.stream for site in sites.values() if site.aim.stream is not None) / samples,
        widest=_bytes(layers) / samples,
    )


def forward_operations(model: nn.Module) -> float:
    """Of the matrix products of one sample, of the shape that the model's adapter makes up."""
    inputs = example_inputs(model)
    program = Program(model, inputs, adapter_for(model).outputs(model), device="meta")
    return _all_operations(program) / len(next(iter(inputs.values())))


def _all_operations(program: Program) -> float:
    return sum(_operations(node) for node in program.nodes if node.op == "call_function")


def _bytes(nodes: Iterable[fx.Node]) -> int:
    """Of the largest value, in float32."""
    return max((4 * prod(shape_of(node)) for node in nodes), default=0)


def _layer(site: RefitSite, samples: int) -> WorkLayer:
    """A linear map, or a convolution as one of its patches."""
    shape = shape_of(site.node.args[1])  # type: ignore[arg-type]
    outputs = shape.pop(site.unit_axis)
    made = shape_of(site.node)
    return WorkLayer(site, prod(made) / made[site.channel_axis] / samples, prod(shape), outputs)


def _operations(node: fx.Node) -> float:
    """Of the matrix products of one op; what works number by number counts nothing."""
    name = op_name(node)
    if name == "linear" or node.target is turned_linear:
        weight = shape_of(node.args[1])  # type: ignore[arg-type]
        return 2.0 * prod(shape_of(node)) * weight[0 if node.target is turned_linear else 1]
    if name in ("conv1d", "conv2d", "conv3d"):
        return 2.0 * prod(shape_of(node)) * prod(shape_of(node.args[1])[1:])  # type: ignore[arg-type]
    if name == "scaled_dot_product_attention":
        query, key, value = (shape_of(x) for x in node.args[:3])  # type: ignore[arg-type]
        return 2.0 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if name in PRODUCTS:
        return 2.0 * prod(shape_of(node)) * shape_of(node.args[PRODUCTS[name]])[-2]  # type: ignore[arg-type]
    return 0.0


def refit_work(planned: Plan, found: ForwardWork, samples: int) -> Work:
    """Operations of a refit on so many samples a task: the forward passes that it rides on, and its regressions."""
    config = planned.config.refit
    assert isinstance(config, RefitConfig)
    experts = len(planned.tasks)
    total = experts * samples
    work = Work(single=total * found.forward * (experts + 1))
    in_mlps = {layer.site.node for layers in found.mlps for layer in layers[:-1]} if config.choose_units else set()
    for layer in found.layers:
        if layer.site.node not in in_mlps:
            work += regression(layer, total, config.rows_per_input)
    if config.choose_units:
        for layers in found.mlps:
            work += choice(layers, total, experts, config.rows_per_input)
            work += refinement(layers, total, config.unit_steps)
    work += Work(single=total * found.attention * experts)  # every expert's values under the merged weights
    work += attention(found, total, config.attention_steps)
    work += rounds(found, total, config.shared_steps)
    if list(planned.cut.blocks) == tower_lengths(planned.spec):
        work += answers(found, total, config.answer_steps)
    return work + (_bases(planned, found, total) if config.stream_bases else Work())


def enter(rows: float, inputs: int, per_input: float) -> float:
    """How many rows enter a regression."""
    limit = per_input * inputs
    return rows if not limit or rows <= NEARLY_ALL * limit else limit


def regression(layer: WorkLayer, samples: int, per_input: float) -> Work:
    """The moments, and the factorisation."""
    rows, d, k = enter(samples * layer.rows, layer.inputs, per_input), layer.inputs, layer.outputs
    return Work(single=rows * d * (d + 2 * k), double=d**3 / 3 + 2 * d * d * k)


def choice(layers: tuple[WorkLayer, ...], samples: int, experts: int, per_input: float) -> Work:
    """The candidates' maps, activations and moments, and the forward selection."""
    *writers, reader = layers
    count, units, outputs = (experts + 1) * reader.inputs, reader.inputs, reader.outputs
    rows = enter(samples * reader.rows, count, min(per_input, ROWS) if per_input else ROWS)
    single = rows * count * (count + 2 * outputs + 2 * sum(layer.inputs for layer in writers))
    double = count * units**2 + 4 * count * units * outputs + units**3
    inputs = writers[0]
    return Work(single, double) + regression(
        WorkLayer(inputs.site, inputs.rows, inputs.inputs, experts * inputs.inputs), samples, per_input
    )


def attention(found: ForwardWork, samples: int, steps: int) -> Work:
    """At most: steps forwards and backwards through attention and its maps, and looks at what is held out."""
    steps = min(steps, attention_refinement.PASSES * ceil(samples / SAMPLES))
    if not found.attention or steps < attention_refinement.EVERY:
        return Work()
    in_mlps = {layer.site.node for layers in found.mlps for layer in layers}
    maps = [layer for layer in found.layers if layer.site.kind == "linear" and layer.site.node not in in_mlps]
    part = found.attention + sum(2 * layer.rows * layer.inputs * layer.outputs for layer in maps)
    return Work(single=part * (3 * steps * SAMPLES + (1 + steps / attention_refinement.EVERY) * samples))


def rounds(found: ForwardWork, samples: int, steps: int) -> Work:
    """At most: steps forwards and backwards through all rounds of shared layers, and looks at what is held out."""
    steps = min(steps, shared_refinement.PASSES * ceil(samples / SAMPLES))
    if steps < shared_refinement.EVERY:
        return Work()
    return Work(single=found.rounds * (3 * steps * SAMPLES + (2 + steps / shared_refinement.EVERY) * samples))


def refinement(layers: tuple[WorkLayer, ...], samples: int, steps: int) -> Work:
    """At most: a step runs the layer forwards and backwards, the latter at twice the price; and all of it twice."""
    *writers, reader = layers
    used = min(samples * reader.rows, unit_refinement.ROOM / (writers[0].inputs + reader.outputs))
    steps = min(steps, max(unit_refinement.FEW, unit_refinement.PASSES * ceil(used / unit_refinement.AT_ONCE)))
    looks = (1 + steps / unit_refinement.EVERY) / HELD_OUT
    rows = 3 * steps * min(unit_refinement.AT_ONCE, used) + (2 + looks) * used
    inside = reader.inputs * (reader.inputs + 2 * reader.outputs) + writers[0].inputs ** 2
    return Work(
        single=rows * sum(2 * layer.inputs * layer.outputs for layer in layers) + 2 * used * inside,
        double=2 * reader.inputs**3,
    )


def answers(found: ForwardWork, samples: int, steps: int) -> Work:
    """At most: steps forwards and backwards through the last MLP and the heads, and looks at what is held out."""
    if not steps:
        return Work()
    at_once, every = SAMPLES, answer_refinement.EVERY
    steps = min(steps, max(every, answer_refinement.PASSES * ceil(samples / at_once)))
    last = sum(2 * layer.rows * layer.inputs * layer.outputs for layer in (found.mlps or [()])[-1])
    trunk = sum(2 * layer.rows * layer.inputs * layer.outputs for layer in found.layers)
    heads = max(found.forward - found.attention - trunk, 0.0)
    looks = 1 + steps / every
    return Work(
        single=steps * at_once * (3 * last + 4 * heads) + samples * ((1 + looks) * last + (1 + 2 * looks) * heads)
    )


def _bases(planned: Plan, found: ForwardWork, total: int) -> Work:
    """The experts once more, over as many samples as are enough, and the joint moments of their streams."""
    writers = [layer for layer in found.layers if layer.site.aim.stream is not None and layer.site.channel_axis == -1]
    if not writers:
        return Work()
    width = max(layer.outputs for layer in writers) * len(planned.tasks)
    rows = max(layer.rows for layer in writers)
    used = min(total, max(1.0, BASIS_ROWS * width / rows))
    moments = len(writers) * used * rows * width * width
    return Work(single=used * found.forward * len(planned.tasks) + moments, double=30.0 * width**3)
