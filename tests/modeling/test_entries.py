"""Entries and exits: a branch in another basis than the trunk's computes the same through its unmerge map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import hf_zipit
from hf_zipit.errors import ZipItError
from hf_zipit.modeling import build
from hf_zipit.modeling.entries import DenseEntry, IndexEntry
from tests import tiny

from .by_hand import FAMILIES, hand_config, make_expert, make_experts, make_inputs, merge_by_hand

WIDTH = 32
BLOCK = "vit.layers.1"


def residual_axes(name: str) -> tuple[int, ...]:
    """The axes of a ViT tensor behind the cut that belong to the residual stream."""
    if (
        name.endswith(("o_proj.weight", "fc2.weight"))
        or ("norm" in name)
        or name.endswith(("o_proj.bias", "fc2.bias"))
    ):
        return (0,)
    return (1,) if name.endswith("weight") else ()


def in_other_basis(tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Unit i of the new residual stream is unit `order[i]` of the old one."""
    moved = {}
    for name, tensor in tensors.items():
        moved[name] = tensor.index_select(residual_axes(name)[0], order) if residual_axes(name) else tensor
    return moved


def entry_tensors(kind: str, key: str, order: Tensor) -> dict[str, Tensor]:
    if kind == "index":
        return {f"entries.{key}.0.index": order}
    return {f"entries.{key}.0.weight": torch.eye(WIDTH)[order], f"entries.{key}.0.bias": torch.zeros(WIDTH)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_a_branch_in_another_basis_reads_the_trunk_through_its_entry(kind: str) -> None:
    shared = FAMILIES["vit"].part
    experts = make_experts("vit", shared)
    entry = {"module": BLOCK, "axis": -1, "units": WIDTH, "size": WIDTH, "kind": kind}
    plain = merge_by_hand(experts, shared)
    tensors: dict[str, Tensor] = {}
    for seed, key in enumerate(plain.branch_names.values()):
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))
        own = {name: value for name, value in plain.state_dict().items() if name.startswith(f"branches.{key}.")}
        tensors |= in_other_basis(own, order) | entry_tensors(kind, key, order)
    moved = merge_by_hand(experts, shared, tensors, entries=[entry])
    inputs = make_inputs("vit")
    torch.testing.assert_close(moved(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)
    for task in experts:
        torch.testing.assert_close(moved(**inputs, task=task).logits, plain(**inputs, task=task).logits)
    moved.entries.load_state_dict(build(moved.config).entries.state_dict())  # and without it, it does not
    assert not torch.allclose(moved(**inputs).logits, plain(**inputs).logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("entry", [IndexEntry, DenseEntry])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_entries_map_their_axis(entry: type, axis: int) -> None:
    made = entry(axis, units=5, size=3)
    index = torch.tensor([2, 0, 0, 1, 2])
    bias = torch.arange(5.0)
    made.load_state_dict({"index": index} if entry is IndexEntry else {"weight": torch.eye(3)[index], "bias": bias})
    x = torch.randn(3, 3, 3)
    wanted = x.index_select(axis, index)
    if entry is DenseEntry:
        wanted = (wanted.movedim(axis, -1) + bias).movedim(-1, axis)
    assert torch.equal(made(x), wanted)


@torch.no_grad()
def test_a_keyword_argument_is_mapped_too() -> None:
    expert = make_expert("bert", 0, ["a", "b"])
    entry = {"module": "bert.encoder.layer.1", "axis": -1, "units": WIDTH, "size": WIDTH}
    merged = merge_by_hand({"one": expert}, FAMILIES["bert"].part, entries=[entry])
    layer = merged.branch("one").bert.encoder.layer[1]
    order = torch.randperm(WIDTH)
    merged.entries["one"][0].index.copy_(order)
    x = torch.randn(2, 6, WIDTH)
    wanted = expert.bert.encoder.layer[1](x[..., order])
    assert torch.equal(layer(hidden_states=x), wanted)
    assert torch.equal(layer(x), wanted)


@torch.no_grad()
def test_a_deep_copy_reads_its_own_entries() -> None:
    entry = {"module": "classifier", "axis": -1, "units": WIDTH, "size": WIDTH}
    merged = merge_by_hand(make_experts("vit", ("vit",)), ("vit",), entries=[entry])
    inputs = make_inputs("vit")
    before = merged(**inputs).logits
    twin = copy.deepcopy(merged)
    for index in merged.entries.buffers():
        index.zero_()
    assert torch.equal(twin(**inputs).logits, before)
    assert not torch.equal(merged(**inputs).logits, before)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "field", "axis"),
    [("bert-features", "last_hidden_state", -1), ("clip", "vision_model_output.last_hidden_state", -1)],
)
def test_exits_map_what_leaves_the_trunk(family: str, field: str, axis: int) -> None:
    shared = FAMILIES[family].whole
    settings = {"field": field, "axis": axis, "units": WIDTH, "size": WIDTH}
    plain = merge_by_hand(make_experts(family, shared), shared)
    orders = [torch.randperm(WIDTH) for _ in plain.branch_names]
    tensors = {f"exits.{key}.0.index": order for key, order in zip(plain.branch_names.values(), orders, strict=True)}
    merged = merge_by_hand(make_experts(family, shared), shared, tensors, exits=[settings])
    inputs = make_inputs(family)
    *parents, name = field.split(".")

    def value(output: object) -> Tensor:
        for parent in [*parents, name]:
            output = output[parent]
        return output

    for task, order in zip(plain.config.tasks, orders, strict=True):
        assert torch.equal(
            value(merged(**inputs, task=task)), value(plain(**inputs, task=task)).index_select(axis, order)
        )
    joint = [
        value(plain(**inputs, task=task))[..., order] for task, order in zip(plain.config.tasks, orders, strict=True)
    ]
    assert torch.equal(value(merged(**inputs)), torch.cat(joint, dim=axis))


@torch.no_grad()
def test_a_wider_trunk_computes_the_same_when_the_new_units_are_idle() -> None:
    shared = FAMILIES["vit"].part
    experts = make_experts("vit", shared)
    plain = merge_by_hand(experts, shared)
    mlp, extra = "trunk.vit.layers.0.mlp", 10
    old = plain.state_dict()
    wide = {
        f"{mlp}.fc1.weight": torch.cat([old[f"{mlp}.fc1.weight"], torch.randn(extra, WIDTH)]),
        f"{mlp}.fc1.bias": torch.cat([old[f"{mlp}.fc1.bias"], torch.randn(extra)]),
        f"{mlp}.fc2.weight": torch.cat([old[f"{mlp}.fc2.weight"], torch.zeros(WIDTH, extra)], dim=1),
    }
    shapes = {name.removeprefix("trunk."): list(tensor.shape) for name, tensor in wide.items()}
    merged = merge_by_hand(experts, shared, wide, trunk_shapes=shapes)
    inputs = make_inputs("vit")
    torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits)
    assert merged.trunk.get_submodule("vit.layers.0.mlp.fc1").out_features == 64 + extra
    assert merged.trunk.get_submodule("vit.layers.0.mlp.fc2").in_features == 64 + extra


@torch.no_grad()
def test_norms_of_a_wider_trunk_know_their_width() -> None:
    expert = make_expert("resnet", 0, ["a", "b"])
    names = [
        name
        for name, tensor in expert.state_dict().items()
        if name.startswith("resnet.embedder.embedder.normalization") and tensor.dim()
    ]
    config = hand_config({"one": expert}, ("resnet.embedder",), trunk_shapes={name: [12] for name in names})
    norm = build(config).trunk.resnet.embedder.embedder.normalization
    assert norm.num_features == 12
    assert {tuple(tensor.shape) for tensor in norm.state_dict().values()} == {(12,), ()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"entries": [{"module": "vit.layers.0", "axis": -1, "units": 3, "size": 3}]},
            "'vit.layers.0' is not a module",
        ),
        (
            {"entries": [{"module": "vit.layers.0.mlp", "axis": -1, "units": 3, "size": 3}]},
            "is not a module of the branches",
        ),
        ({"entries": [{"module": "vit.nothing", "axis": -1, "units": 3, "size": 3}]}, "does not exist"),
        ({"entries": [{"module": BLOCK, "axis": -1, "units": 3}]}, "lacks 'size'"),
        ({"entries": [{"module": BLOCK, "axis": -1, "units": 3, "size": 3, "kind": "soft"}]}, "kind 'soft'"),
        ({"trunk_shapes": {"vit.layers.1.mlp.fc1.weight": [3, 3]}}, "not a tensor of the trunk"),
        ({"trunk_shapes": {"vit.layers.0.mlp.fc1.wait": [3, 3]}}, "not a tensor of the trunk"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named(settings: dict, message: str) -> None:
    shared = FAMILIES["vit"].part
    with pytest.raises(ZipItError, match=message):
        build(hand_config(make_experts("vit"), shared, **settings))


@pytest.mark.parametrize("task", ["a", None])
def test_torch_compile_follows_the_whole_forward_pass_and_runs_the_trunk_once(task):
    experts = dict(zip("ab", tiny.pair("vit"), strict=True))
    merged, pixels = hf_zipit.merge(experts, method="weights"), torch.randn(2, 3, 16, 16)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(merged.for_task(task), fullgraph=True, backend=keep)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values=pixels).logits, merged(pixel_values=pixels, task=task).logits)
    (graph,) = graphs
    assert sum("conv2d" in str(node.target) for node in graph.graph.nodes) == 1
