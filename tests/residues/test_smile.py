"""SMILE's gates: every token of a linear layer gets the residues that the equations say, and all else stays."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.pytorch_utils import Conv1D

from hf_zipit import MergeConfig, merge, plan
from hf_zipit.errors import RecipeError, ZipItError
from hf_zipit.modeling.gates import LINEAR, Gate
from hf_zipit.modeling.residue import from_half, to_half
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.residues.routers.smile import leading_directions
from tests import tiny


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = {
    "vit": {"pixel_values": draw(2, 3, 16, 16)},
    "gpt2": {"input_ids": torch.arange(10).view(2, 5)},
}
"""Of models whose linear layers keep their matrices as they are read, and the other way round."""

KINDS: dict[str, dict[str, Any]] = {"low-rank": {"size": 2.0}, "tall": {}}
"""A kind that is spent a budget on, and one of which all tasks share something."""


@cache
def world(family: str) -> tuple[dict[str, nn.Module], nn.Module]:
    """Three experts, and their base."""
    base = tiny.pair(family)[0]
    experts = {}
    for seed, name in enumerate("abc", 1):
        experts[name] = copy.deepcopy(base)
        for number, parameter in enumerate(experts[name].parameters()):
            parameter.data += 0.05 * draw(*parameter.shape, seed=1000 * seed + number)
    return experts, base


@cache
def merged(
    family: str = "vit", kind: str = "low-rank", based: bool = True, router: str | None = "smile", **options: int
) -> nn.Module:
    experts, base = world(family)
    residues = {"kind": kind, **KINDS[kind], "router": router, "router_options": options}
    read = base if based and (router or kind == "tall") else None
    return merge(experts, base=read, method="identity", residues=residues)


@torch.no_grad()
def logits(model: nn.Module, task: Any = None, family: str = "vit") -> Tensor:
    return model(**INPUTS[family], task=task).logits


def by_the_equations(
    layer: nn.Module, directions: list[Tensor], changes: list[dict[str, Tensor]], top: int, x: Tensor
) -> Tensor:
    """y + sum_t g_t (R_t x + r_t), a token at a time, in float64."""
    weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).double()
    found = []
    for token in x.double().flatten(0, -2):
        gates = torch.stack([(v @ token).norm() for v in directions]).softmax(-1)
        kept = gates.sort(descending=True).indices[:top]
        y = weight @ token + layer.bias.double()
        for t in kept.tolist():
            y = y + gates[t] / gates[kept].sum() * (changes[t]["weight"] @ token + changes[t]["bias"])
        found.append(y)
    return torch.stack(found).view(*x.shape[:-1], -1).to(x)


@pytest.mark.parametrize(
    ("family", "kind", "based", "rank", "top"),
    [
        ("vit", "low-rank", True, 3, 1),
        ("vit", "tall", True, 8, 2),
        ("vit", "low-rank", False, 2, 1),
        ("gpt2", "low-rank", True, 3, 1),
    ],
)
def test_tokens_get_the_residues_that_the_equations_say(family: str, kind: str, based: bool, rank: int, top: int):
    experts, base = world(family)
    model = merged(family, kind, based, rank=rank, top=top)
    by_hand = copy.deepcopy(merged(family, kind, based, router=None))
    plain = logits(by_hand, family=family)
    layers = [(path, module) for path, module in by_hand.trunk.named_modules() if isinstance(module, LINEAR)]
    assert len(layers) == len(model.gates) > 4
    paths = list(dict.fromkeys(setting["tensor"].rpartition(".")[0] for setting in model.config.residues))
    for path, layer in layers:
        residues = model.residues[paths.index(path)]
        own, directions = [], []
        for task, expert in experts.items():
            there, start = expert.get_submodule(path), base.get_submodule(path)
            turn = (lambda m: m.T) if isinstance(layer, Conv1D) else (lambda m: m)
            change = {name: tensor.double() for name, tensor in residues.tensors(task).items()}
            own.append({"weight": turn(change["weight"]), "bias": change["bias"]})
            vector = there.weight.double() - start.weight.double() if based else there.weight.double()
            directions.append(torch.linalg.svd(turn(vector).detach(), full_matrices=False)[2][:rank])
        layer.forward = partial(by_the_equations, copy.copy(layer), directions, own, top)
    found, expected = logits(model, family=family), logits(by_hand, family=family)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert (found - plain).abs().max() > 0.05


def test_where_a_task_is_named_its_residues_are_added_as_ever():
    plain = merged(router=None)
    for task in ("a", "b", list("ab")):
        assert torch.equal(logits(merged(), task), logits(plain, task))


def test_the_trunk_runs_once_for_all_tasks():
    model, calls = copy.deepcopy(merged()), []
    model.trunk.get_submodule("vit.layers.0.mlp.fc1").register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(logits(model), logits(merged()))
    assert len(calls) == 1


def test_a_saved_model_routes_the_same_and_its_gates_count(tmp_path: Path):
    merged().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged()))
    gates = sum(gate.directions.nbytes for gate in again.gates)
    assert gates == sum(2 * 3 * 16 * layer["units"] for layer in again.config.gates["layers"])
    assert residue_bytes(again)[1] == gates + residue_bytes(merged(router=None))[1]
    assert MergeConfig.from_pretrained(tmp_path).residues.router == "smile"
    assert "every token" in (tmp_path / "README.md").read_text()


def test_a_copy_has_gates_and_residues_of_its_own():
    twin = copy.deepcopy(merged())
    for buffer in twin.residues.buffers():
        buffer.zero_()
    assert torch.equal(logits(twin), logits(merged(router=None)))
    for gate in (turned := copy.deepcopy(merged())).gates:
        gate.directions.copy_(gate.directions.flip(0))
    assert not torch.equal(logits(turned), logits(merged()))
    assert not torch.equal(logits(merged()), logits(twin))


def test_a_token_in_one_tasks_directions_is_that_tasks():
    """Each task read one direction anew; a token along it is answered as its expert answers."""
    base = nn.Sequential(nn.Linear(6, 5))
    gate_inputs = torch.eye(6)[:2]
    experts = [copy.deepcopy(base) for _ in range(2)]
    for expert, direction in zip(experts, gate_inputs, strict=True):
        expert[0].weight.data += torch.outer(draw(5), direction)
    gate = Gate(["a", "b"], 2, 6, 1)
    vectors = [(expert[0].weight - base[0].weight).detach().double() for expert in experts]
    gate.directions.copy_(to_half(torch.stack([leading_directions(vector, 2, 1e-4) for vector in vectors])))
    lengths = from_half(gate.directions).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([[1.0, 0.0]] * 2))  # there is no second one that a task changed
    torch.testing.assert_close(gate(7 * gate_inputs), torch.eye(2))
    torch.testing.assert_close(gate(gate_inputs.sum(0)).sum(), torch.tensor(1.0))
    both = Gate(["a", "b"], 2, 6, 2)
    both.directions.copy_(gate.directions)
    torch.testing.assert_close(both(torch.eye(6)[4]), torch.tensor([0.5, 0.5]))  # what neither changed


@pytest.mark.parametrize(
    ("residues", "message"),
    [
        ({"router": "smiles"}, "There is no router named 'smiles'; did you mean 'smile'"),
        ({"router": "smile", "router_options": {"ranks": 3}}, "'smile' has no option 'ranks'; did you mean 'rank'"),
        ({"router_options": {"rank": 3}}, r"router_options \['rank'\] are a router's own; name the router"),
        ({"router": True, "router_options": {"rank": 3}}, "'discriminant' has no option 'rank'; it takes none"),
        ({"router": 3}, "residues.router should be a text or true or false, but is 3"),
    ],
)
def test_settings_of_no_router_are_told(residues: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        MergeConfig(residues=residues)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "smile's rank is 0; it must be at least 1"),
        ({"top": 4}, "smile's top is 4; it must be at least 1 and at most the number of tasks, 3"),
    ],
)
def test_options_out_of_range_are_told(options: dict[str, int], message: str):
    with pytest.raises(RecipeError, match=message):
        merged(**options)


def test_a_base_is_read_for_the_directions_alone():
    experts, base = world("vit")
    assert plan(experts, base=base, method="identity", residues={"router": "smile"}, data=False).bases
    with pytest.raises(RecipeError, match="reads no base"):
        plan(experts, base=base, method="identity", residues={"router": None}, data=False)


def test_gates_that_fit_nothing_are_told():
    model = copy.deepcopy(merged(router=None))
    layer = {"module": "vit.layers.0.mlp.fc1", "rank": 1, "units": 32}
    for path, message in (("vit.layers.9", "not a module of the trunk"), ("vit.layers.0", "has no residues")):
        with pytest.raises(ZipItError, match=message):
            copy.deepcopy(model).add_gates(1, [{**layer, "module": path}])
    model.add_gates(1, [layer])
    with pytest.raises(ZipItError, match="has gates already"):
        model.add_gates(1, [layer])
