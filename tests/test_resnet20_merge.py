"""The library, from tracing to outputs, against the published merges of two ResNet-20: see `resnet20.py` for the file.

The network is a plain `nn.Module`: nothing here knows Hugging Face. The published merge matrices divide by |group| +
1e-5 where we divide by |group|. That is undone exactly (`as_published`), so that everything else is compared at the
precision of float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_zipit.adapters import Adapter
from hf_zipit.align.align import align
from hf_zipit.combine.combine import merge_tensor
from hf_zipit.data.calibration import Calibration
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import unmerge_index
from hf_zipit.modeling.entries import IndexEntry
from hf_zipit.observation import Moments, gather_moments
from hf_zipit.planning.cut import cut_model
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import Probe, ProductKey

from .resnet20 import SPACES, ResNet20

VECTORS = Path(__file__).parent / "vectors" / "zipit_e2e_resnet20_w025.npz"
ROUNDING = 1e-6
SETTINGS = {
    "identity": ("identity", {}),
    "permute": ("permute", {}),
    "zip_a.3_b.125": ("zip", {"alpha": 0.3, "beta": 0.125, "compat": True}),
    "zip_a1e-4_b.075": ("zip", {"alpha": 1e-4, "beta": 0.075, "compat": True}),
}
"""Per merge in the file, how to ask for it."""


class ResNet20Adapter(Adapter):
    """Where the network can be cut, and what each task keeps."""

    model_types: ClassVar[tuple[str, ...]] = ("resnet20",)

    def towers(self, model: nn.Module) -> list[list[str]]:
        return [[f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]]

    def head(self, model: nn.Module) -> tuple[str, ...]:
        return ("linear",)


@cache
def numbers() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def section(prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: x for name, x in numbers().items() if name.startswith(f"{prefix}.")}


def network(tensors: Mapping[str, Tensor]) -> ResNet20:
    model = ResNet20()
    model.load_state_dict(dict(tensors))
    return model.eval()


@cache
def experts() -> dict[str, ResNet20]:
    return {name: network(section(name)) for name in ("A", "B")}


@cache
def spec_and_nodes(adapter: Adapter | None = None) -> tuple[MergeSpec, dict[str, ProductKey]]:
    """The spec with the published probes (a stage's stream at the end of the stage), and the space of every node."""
    spec = MergeSpec.from_model(experts()["A"], {"x": numbers()["x"][:2]}, adapter)
    keys = {(probe.module, probe.where): probe.key for probe in spec.probes}
    probes = {}
    for node, path in SPACES.items():
        if "." in path:
            probes[node] = Probe(f"{path}.conv2", "input", 1, keys[f"{path}.conv2", "input"])
        else:
            probes[node] = Probe(f"{path}.2", "output", 1, keys[f"{path}.1.conv1", "input"])
    return replace(spec, probes=tuple(probes.values())), {node: probe.key for node, probe in probes.items()}


@cache
def moments() -> Moments:
    spec, _ = spec_and_nodes()
    calibration = Calibration(numbers()["x"], batch_size=16).read(experts())
    return gather_moments(spec, experts(), calibration, row_fraction=1.0)


def published_correlations(nodes: Mapping[str, ProductKey]) -> dict[ProductKey, Tensor]:
    found = {}
    for node, key in nodes.items():
        covariance = numbers()[f"node{node}.cov"].double()
        std = covariance.diagonal().sqrt()
        found[key] = covariance / torch.outer(std, std).clamp_min(1e-7)
    return found


def published_labels(tag: str, node: str) -> Tensor:
    return numbers()[f"{tag}.node{node}.merge"].argmax(0).reshape(2, -1)


def as_published(name: str, alignment: Alignment, spec: MergeSpec) -> Tensor:
    """A merged tensor, as if M divided by |group| + 1e-5."""
    merged = merge_tensor(
        [model_tensors(model)[name] for model in experts().values()], spec.axes[name], alignment, spec
    )
    for axis, label in enumerate(spec.axes[name]):
        for factor in label:
            if factor.space in alignment and not factor.dual:
                counts = alignment[factor.space].counts()
                share = (counts / (counts + 1e-5)).reshape(-1, *(1 for _ in merged.shape[axis + 1 :]))
                merged = merged * share
    return merged


def assert_near(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


def test_spec_has_the_published_spaces():
    spec, nodes = spec_and_nodes()
    movable = {name for name in spec.spaces if spec.movable(name)}
    assert movable == {name for key in nodes.values() for name in key}
    assert len(movable) == len(SPACES)


def test_observed_covariances_are_the_published_ones():
    _, nodes = spec_and_nodes()
    for node, key in nodes.items():
        assert_near(moments().covariance(key).float(), numbers()[f"node{node}.cov"], 3e-6)  # theirs: float32 sums


@pytest.mark.parametrize("tag", SETTINGS)
def test_own_pass_finds_the_published_partitions(tag: str):
    method, options = SETTINGS[tag]
    spec, nodes = spec_and_nodes()
    correlations = {key: moments().correlation(key) for key in moments().sums}
    alignment = align(spec, correlations, 2, method, options=options)
    for node, (space,) in nodes.items():
        found, expected = alignment[space].labels, published_labels(tag, node)
        if method == "zip" and node == "63":
            # One choice hangs on a tie: B's unit 15 is as correlated with A's 14 as with B's 4, to 5e-8. In exact
            # arithmetic the first wins, as here; rounded to float32, as published, the second does.
            tie = correlations[(space,)][31, [14, 16 + 4]]
            assert abs(tie[0] - tie[1]) < 1e-7
            found, expected = found.reshape(-1)[:31], expected.reshape(-1)[:31]
        assert torch.equal(found, expected), f"node {node}"


@pytest.mark.parametrize("tag", SETTINGS)
def test_whole_merge_is_the_published_one(tag: str):
    method, options = SETTINGS[tag]
    spec, nodes = spec_and_nodes()
    alignment = align(spec, published_correlations(nodes), 2, method, options=options)
    published = section(f"{tag}.merged")
    merged = {name: as_published(name, alignment, spec) for name in spec.axes}
    assert set(merged) | spec.unused == set(published)
    for name, tensor in merged.items():
        assert_near(tensor, published[name])
    model = network({**section("A"), **merged})
    with torch.no_grad():
        assert_near(model(numbers()["x"][:8]), numbers()[f"{tag}.out"], 1e-5)


def test_partial_merge_is_the_published_one():
    spec, nodes = spec_and_nodes(ResNet20Adapter())
    cut = cut_model(experts()["A"], spec, "layer2.0")
    spec = cut.trunk_spec(spec)
    assert {name for name in spec.spaces if spec.movable(name)} == {nodes[node][0] for node in ("5", "11", "17", "21")}
    (entry,) = cut.entries
    assert (entry.target, entry.axis, entry.key) == ("layer2.0", 1, nodes["21"])

    correlations = {key: r for key, r in published_correlations(nodes).items() if spec.movable(key[0])}
    alignment = align(spec, correlations, 2, "zip", options={"alpha": 0.3, "beta": 0.125, "compat": True})
    trunk = {name: as_published(name, alignment, spec) for name in cut.trunk if name in spec.axes}
    for name, tensor in trunk.items():
        assert_near(tensor, numbers()[f"zip_partial21.merged.{name}"])

    outputs = []
    for number, expert in enumerate(experts().values()):
        branch = copy.deepcopy(expert)
        branch.load_state_dict({**branch.state_dict(), **trunk})
        readout = IndexEntry(entry.axis, spec.size(entry.key), alignment[entry.key[0]].size)
        readout.index.copy_(unmerge_index(alignment, entry.key, number, spec))
        branch.get_submodule(entry.target).register_forward_pre_hook(readout.before, with_kwargs=True)
        with torch.no_grad():
            outputs.append(branch(numbers()["x"][:8]))
    assert_near(torch.stack(outputs), numbers()["zip_partial21.out"], 1e-5)
