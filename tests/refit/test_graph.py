"""The program computes what the model does, and everything that can be solved has a site."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hf_zipit.adapters import adapter_for
from hf_zipit.config import MergeConfig
from hf_zipit.errors import SpecError
from hf_zipit.planning.plan import Plan, make_plan
from hf_zipit.refit.convolution import patches
from hf_zipit.refit.fit import as_traced
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import RefitSite, find_shared, find_sites
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.trace import select_outputs

from .. import tiny
from ..test_invariants import calibration, case


@cache
def program(name: str, depth: float = 1.0) -> tuple[Program, Plan]:
    model = case(name).model
    planned = make_plan({"a": model, "b": model}, MergeConfig(method="identity", depth=depth))
    return Program(model, calibration(model), adapter_for(model).outputs(model), planned.cut.trunk), planned


def run(made: Program, tensors: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    values: dict = {}
    with torch.no_grad():
        for node in made.nodes:
            values[node] = made.run(node, values.__getitem__, tensors, inputs)
    return {field: values[node] for field, node in made.outputs.items()}


@pytest.mark.parametrize(
    "name",
    tiny.mostly_seldom(
        [*(name for name in tiny.REQUIRED if name in tiny.TRUNKS), "vit-eager", "dinov2", "convnext", "albert"], 2
    ),
)
def test_node_by_node_is_the_forward_pass(name: str):
    model = case(name).model
    inputs = calibration(model)
    made, _ = program(name)
    with torch.no_grad():
        expected = select_outputs(model(**inputs), adapter_for(model).outputs(model))
    found = run(made, model_tensors(model), inputs)
    assert found.keys() == expected.keys()
    for field, tensor in expected.items():
        if name.endswith("eager"):  # which is one op now
            torch.testing.assert_close(found[field], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found[field], tensor), field


def covered(made: Program, sites: dict) -> set[str | None]:
    names: set[str | None] = set()
    for site in sites.values():
        names |= {site.weight, site.bias}
        if site.norm is not None:
            names |= {made.tensor_of(node) for node in site.norm.args[1:5]}
    return names


@pytest.mark.parametrize("name", tiny.REQUIRED)
@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_every_tensor_of_the_trunk_has_a_site(name: str, depth: float):
    made, planned = program(name, depth)
    sites = find_sites(made, planned.cut.trunk, planned.spec.head)
    names = covered(made, sites)
    assert names - {None} <= planned.cut.trunk
    tensors = model_tensors(case(name).model)
    left = {n for n in planned.cut.trunk - names if n in planned.spec.axes and tensors[n].is_floating_point()}
    assert not left
    weights = [site.weight for site in sites.values()]
    assert len(weights) == len(set(weights))


@pytest.mark.parametrize("name", tiny.REQUIRED)
def test_residual_writers_aim_at_the_stream(name: str):
    """Two for every block: attention and MLP, or the last convolution or the shortcut of a residual network."""
    made, planned = program(name)
    sites = find_sites(made, planned.cut.trunk, planned.spec.head).values()
    in_blocks = [s for s in sites if s.stream is not None and any(b.path in s.weight for b in planned.spec.blocks)]
    each = 1 if name.startswith("resnet") else 2
    assert len(in_blocks) == each * len(planned.spec.blocks)
    for site in in_blocks:
        assert made.position[site.other] < made.position[site.node] < made.position[site.stream]


@pytest.mark.parametrize("name", ["bert-masked", "roberta-masked", "distilbert-masked"])
def test_a_tied_table_goes_by_its_name_in_the_trunk(name: str):
    """Else the merged model would look its words up in the first expert's table."""
    made, planned = program(name)
    words = [n for n in planned.cut.trunk if n.endswith("word_embeddings.weight")]
    sites = [s for s in find_sites(made, planned.cut.trunk, planned.spec.head).values() if s.weight in words]
    assert [site.kind for site in sites] == ["embedding"] and len(words) == 1
    model = case(name).model
    other = dict(model_tensors(model), **{words[0]: torch.zeros_like(model_tensors(model)[words[0]])})
    looked_up: list[Tensor] = []
    values: dict = {}
    with torch.no_grad():
        for node in made.nodes:
            values[node] = made.run(node, values.__getitem__, other, calibration(model))
            if node is sites[0].node:
                looked_up.append(values[node])
                break
    assert not looked_up[0].any()


def test_shared_weights_have_their_places_and_no_site_of_their_own():
    """ALBERT uses one block several times: what is best at one place would be wrong at the others."""
    made, planned = program("albert")
    sites = find_sites(made, planned.cut.trunk, planned.spec.head).values()
    assert sites and not any("albert_layers" in site.weight for site in sites)
    shared = find_shared(made, planned.cut.trunk, planned.spec.head)
    layers = case("albert").model.config.num_hidden_layers
    assert {len(places) for places in shared} == {layers}
    assert all(len({(site.weight, site.bias) for site in places}) == 1 for places in shared)


class Writing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "halves":
            one, other = y[:, :1], y[:, 1:3]
            one.mul_(2)
            return one + other
        if self.how == "result":
            y += x
            return y.relu_() + 1
        if self.how == "argument":
            y.add_(x)
            y.mul_(2)
            return y - x
        part = y[:, 0]
        if self.how == "parts":
            y[:, 0] = 1.0
            y[0, 1:] = x[1, 1:]
            y.transpose(0, 1)[2].mul_(2)
            y.unsqueeze(1)[:, 0, 1] = 5.0
            return y + y[:, :1]
        part.mul_(2)
        if self.how == "part again":
            part.add_(1)
        return y[:, :1] if self.how == "part again" else y * part[:, None] * self.seen(y)

    def seen(self, y: Tensor) -> Tensor:
        part = y[0]
        y[:, 1] = 3
        return part


@pytest.mark.parametrize("how", ["result", "argument", "parts", "halves"])
def test_in_place_ops_write_into_nothing(how: str):
    model = Writing(how)
    inputs = {"x": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))}
    made = Program(model, inputs, None)
    before = inputs["x"].clone()
    found = run(made, model_tensors(model), inputs)["output"]
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs))
    assert torch.equal(inputs["x"], before)


class Counting(nn.Module):
    """An index that is written piece by piece, as classes make those of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(9).view(3, 3).contiguous()
        index[:, 0] += 1
        first = self.table[index[:, 0]]
        index[1:] = 2
        return x + first + self.table[index[:, 1]]


def test_what_is_written_piece_by_piece_from_nothing_is_known_beforehand():
    model, inputs = Counting(), {"x": torch.randn(3, 3)}
    made = Program(model, inputs, None)
    assert not any("copy" in str(node.target) for node in made.nodes)
    with torch.no_grad():
        torch.testing.assert_close(run(made, model_tensors(model), inputs)["output"], model(**inputs))


@pytest.mark.parametrize("how", ["part again", "part read"])
def test_writing_into_a_part_that_another_view_shows_is_refused(how: str):
    with pytest.raises(SpecError, match="writes into a part"):
        Program(Writing(how), {"x": torch.randn(2, 3)}, None)


CONVOLUTIONS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "dilation": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 2, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "kind": nn.Conv1d},
    {"kernel_size": (2, 3, 1), "dilation": (1, 2, 1), "groups": 2, "kind": nn.Conv3d},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_patches_times_weights_are_the_convolution(settings: dict):
    settings = dict(settings)
    kind = settings.pop("kind", nn.Conv2d)
    model = nn.Sequential(kind(2, 6, **settings)).eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = model

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    named = Named()
    x = torch.randn(2, 2, *(8, 9, 7)[: model[0].weight.dim() - 2], generator=torch.Generator().manual_seed(0))
    made = Program(named, {"x": x}, None)
    (site,) = find_sites(made, frozenset(model_tensors(named))).values()
    assert isinstance(site, RefitSite) and site.kind == "conv"
    with torch.no_grad():
        expected = named(x).flatten(2).mT.flatten(0, 1)
        weight = model[0].weight

        def made_of(rows: Tensor | slice) -> Tensor:
            seen = patches(x, weight, site.node, rows).unflatten(1, (site.groups, -1))
            groups = weight.flatten(1).unflatten(0, (site.groups, -1))
            return torch.einsum("rgd,gkd->rgk", seen, groups).flatten(1) + model[0].bias

        found = made_of(slice(None))
        rows = torch.tensor([5, 0, len(expected) - 1])
        some = made_of(rows)
        assert torch.equal(at_rows(named(x), 1, rows), expected[rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some, expected[rows], rtol=1e-5, atol=1e-5)


def test_sizes_that_depend_on_the_samples_are_told():
    made, _ = program("vit")
    node = next(
        node for node in made.nodes if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == 3
    )
    value = torch.zeros(node.meta["val"].shape)
    assert as_traced(node, value) is value
    with pytest.raises(SpecError, match="must not depend on the samples"):
        as_traced(node, value[:, 1:])
