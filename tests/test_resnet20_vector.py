"""The published merges of two ResNet-20: what was observed, which partitions follow, merged weights and outputs.

The axis labels are written by hand here; `tests/resnet20.py` says what the file's numbers mean.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_zipit.align.align import align
from hf_zipit.combine.combine import merge_tensor
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.symmetry.spec import AxisLabel, Factor
from tests.align.toys import partition, space, spec_of, vectors
from tests.resnet20 import SPACES, ResNet20

FILE = {name: torch.from_numpy(values) for name, values in vectors("zipit_e2e_resnet20_w025").items()}
METHODS = {
    "zip_a.3_b.125": ("zip", {"alpha": 0.3, "beta": 0.125, "compat": True}),
    "zip_a1e-4_b.075": ("zip", {"alpha": 1e-4, "beta": 0.075, "compat": True}),
    "permute": ("permute", {}),
    "identity": ("identity", {}),
}


def state(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in FILE.items() if name.startswith(f"{prefix}.")}


def network(prefix: str) -> ResNet20:
    model = ResNet20()
    model.load_state_dict(state(prefix))
    return model.eval()


def label_axes(name: str, tensor: Tensor) -> list[AxisLabel]:
    """The space that every axis of a parameter or buffer belongs to; positions of a kernel and classes are fixed."""
    *where, module, _ = name.split(".")
    stage = where[0] if where else "layer1"
    before = {"layer1": "layer1", "layer2": "layer1", "layer3": "layer2"}[stage]
    stream_in = before if ".0." in name else stage
    if name == "conv1.weight":
        written, read = "layer1", "image"
    elif module == "linear":
        written, read = "classes", "layer3"
    elif not where or "shortcut" in where or module in ("conv2", "bn2"):
        written = stage
        read = before if "shortcut" in where else ".".join(where)
    else:
        written, read = ".".join(where), stream_in
    kernel = (Factor("kernel"),)
    return [(Factor(written),), (Factor(read, dual=True),), kernel, kernel][: tensor.dim()]


def correlation_of(covariance: Tensor) -> Tensor:
    std = covariance.double().diagonal().sqrt()
    return covariance.double() / torch.outer(std, std).clamp(min=1e-7)


SPEC = spec_of(
    space("image", 3, fixed=True),
    space("kernel", 3, fixed=True),
    space("classes", 10, fixed=True),
    *(space(name, FILE[f"node{node}.cov"].shape[0] // 2) for node, name in SPACES.items()),
)


def observed() -> dict[str, Tensor]:
    """What the two networks' features are on `x`, by space: `[2 * channels, samples * positions]`."""
    features: dict[str, list[Tensor]] = {name: [] for name in SPACES.values()}
    for prefix in "AB":
        model = network(prefix)
        for name, found in features.items():
            place = model.get_submodule(name)
            place = place.relu1 if name.count(".") else place
            place.register_forward_hook(lambda m, i, out, found=found: found.append(out.movedim(1, 0).flatten(1)))
        with torch.no_grad():
            model(FILE["x"])
    return {name: torch.cat(found) for name, found in features.items()}


@pytest.fixture(scope="module")
def features() -> dict[str, Tensor]:
    return observed()


def test_the_covariances_are_of_the_places_named(features):
    for node, name in SPACES.items():
        found = torch.cov(features[name].double(), correction=0)
        expected = FILE[f"node{node}.cov"].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("tag", METHODS)
def test_the_whole_merge(tag):
    method, options = METHODS[tag]
    correlations = {(name,): correlation_of(FILE[f"node{node}.cov"]) for node, name in SPACES.items()}
    alignment = align(SPEC, correlations, 2, method, options=options)
    for node, name in SPACES.items():
        published = FILE[f"{tag}.node{node}.unmerge"].argmax(1)
        assert partition(alignment[name].labels) == partition(published), (tag, name)

    # The published columns are not in the order of their first members: compare weights in the published order.
    alignment = {
        name: SpaceMap(m.size, FILE[f"{tag}.node{node}.unmerge"].argmax(1).reshape(2, -1))
        for node, name in SPACES.items()
        for m in [alignment[name]]
    }
    a, b = state("A"), state("B")
    merged = {name: merge_tensor([a[name], b[name]], label_axes(name, a[name]), alignment, SPEC) for name in a}
    for name, expected in state(f"{tag}.merged").items():
        # Published merge matrices divide by |group| + 1e-5.
        torch.testing.assert_close(merged[name], expected, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    model = ResNet20()
    model.load_state_dict(merged)
    with torch.no_grad():
        out = model.eval()(FILE["x"][:8])
    torch.testing.assert_close(out, FILE[f"{tag}.out"], rtol=0, atol=1e-3 * float(FILE[f"{tag}.out"].abs().max()))
