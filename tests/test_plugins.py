"""Other packages add whatever can be chosen by entry points; a broken one breaks nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_zipit import ZipItForImageClassification

ROOT = Path(__file__).parents[1]

GROUPS = ("methods", "rules", "lora_rules", "corrections", "adapters", "trainings", "residues", "routers")

EXTRAS = """
import torch
from hf_zipit import (
    register_adapter, register_correction, register_lora_rule, register_method, register_residue, register_router,
    register_rule, register_training,
)
from hf_zipit.adapters.auto import Adapter
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.modeling.residue import Residue
from hf_zipit.polish.distance import Distance
from hf_zipit.polish.kind import Learnt

used = set()


@register_method("mirror", needs=set())
def mirror(correlation, experts, *, flipped=True):
    used.add("method")
    units = correlation.shape[-1] // experts
    order = torch.arange(units)
    return SpaceMap(units, torch.stack([order, *[order.flip(0) if flipped else order] * (experts - 1)]))


@register_rule("first")
def first(tensors, labels, plan, *, scale=1.0):
    used.add("rule")
    return scale * tensors[0]


@register_correction("louder")
def louder(merged, planned, maps, calibration, moments, *, amount=1.0):
    used.add("correction")
    with torch.no_grad():
        for name, tensor in merged.trunk.named_parameters():
            if name.endswith("embeddings.cls_token"):
                tensor += amount


@register_lora_rule("widest")
def widest(updates, given, *, least=1):
    return {layer: max(own, key=lambda update: update.rank) for layer, own in updates.items()}


@register_training("shifts", about="its shifts", loss="distance from the experts")
def shifts(done, *, weighed=1.0):
    used.add("training")
    parameters = {name: p for name, p in done.merged.trunk.named_parameters() if name.endswith("bias")}
    return Learnt(parameters, Distance(done.merged, done.planned, done.positions, weighed))


@register_residue("means")
class Means(Residue):
    def __init__(self, shape, size=1):
        super().__init__(shape, size)
        self.register_buffer("mean", torch.zeros(()))

    def tensor(self, shared=None):
        return self.mean.expand(self.shape)

    @classmethod
    def pack(cls, tensors, *, scale=1.0):
        used.add("residue")
        found = [cls(tensor.merged.shape) for tensor in tensors]
        for residue, tensor in zip(found, tensors):
            residue.mean.fill_(scale * tensor.residue.mean())
        return None, found


@register_router("chance")
def chance(merged, planned, maps, calibration, *, top=1):
    used.add("router")
    layer = {"module": "dinov2.encoder.layer.0.mlp.fc1", "rank": 1, "units": 32}
    merged.add_gates(top, [layer])


@register_adapter
class Dinov2Adapter(Adapter):
    model_types = ("dinov2",)

    def towers(self, model):
        used.add("adapter")
        return [["dinov2.encoder.layer.0", "dinov2.encoder.layer.1"]]
"""

MERGE = """
import json, sys
import torch
from hf_zipit import merge
from hf_zipit.registry import ADAPTERS, CORRECTIONS, LORA_RULES, METHODS, RESIDUES, ROUTERS, RULES, TRAININGS
from tests import tiny

models = dict(zip("ab", tiny.pair("dinov2"), strict=True))
options = {"flipped": True}
merged = merge(
    models, torch.randn(8, 3, 16, 16), method="mirror", options=options, combine="first",
    combine_options={"scale": 1.0}, corrections=[{"louder": {"amount": 2.0}}],
)
merged.save_pretrained(sys.argv[1])
learnt = merge(
    models, torch.randn(8, 3, 16, 16), method="identity",
    residues={"kind": "means", "options": {"scale": 0.5}, "router": "chance", "router_options": {"top": 2}},
    polish={"kind": "shifts", "options": {"weighed": 0.0}, "steps": 1, "evaluate_every": 1},
)
about = [learnt.config.method["polished"]["kind"], sorted({setting["kind"] for setting in learnt.config.residues})]
from extras import used
own = models["a"].state_dict()
changed = {n: float((t - own[n]).mean()) for n, t in merged.trunk.state_dict().items() if not torch.equal(t, own[n])}
registries = (METHODS, RULES, LORA_RULES, CORRECTIONS, ADAPTERS, TRAININGS, RESIDUES, ROUTERS)
names = [[*registry] for registry in registries]
print(json.dumps({"used": sorted(used), "changed": changed, "names": names, "about": about}))
"""


BROKEN: dict[str, tuple[str | None, str]] = {
    "raising": ("raise RuntimeError('out of luck')", "out of luck"),
    "lacking": ("import no_such_package", "No module named 'no_such_package'"),
    "vanished": (None, "No module named 'vanished'"),
}
"""Packages whose import fails, and why."""


def install(folder: Path, name: str, source: str | None, groups: tuple[str, ...] = ("methods",)) -> None:
    """A package as pip would leave it: its module (if it has one) and what it announces."""
    if source is not None:
        (folder / f"{name}.py").write_text(source)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("".join(f"[hf_zipit.{group}]\n{name} = {name}\n\n" for group in groups))


def fresh(folder: Path, code: str, *arguments: object) -> subprocess.CompletedProcess:
    """A process of its own, in which the packages of a folder are installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_a_package_adds_one_of_every_kind(tmp_path: Path):
    """A broken one is a warning that names it, and breaks nothing else."""
    install(tmp_path, "extras", EXTRAS, GROUPS)
    for name, (source, _) in BROKEN.items():
        install(tmp_path, name, source)
    done = fresh(tmp_path, MERGE, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["used"] == ["adapter", "correction", "method", "residue", "router", "rule", "training"]
    assert found["changed"] == {"dinov2.embeddings.cls_token": pytest.approx(2.0)}
    assert found["about"] == ["shifts", ["dense", "means"]]
    own = ("mirror", "first", "widest", "louder", "dinov2", "shifts", "means", "chance")
    for name, names in zip(own, found["names"], strict=True):
        assert name in names and len(names) > 1
    for name, (_, reason) in BROKEN.items():
        assert f"The method of the plugin {name} was not loaded: {reason}\n" in done.stderr
    # What was merged with plugins is used without them.
    model = ZipItForImageClassification.from_pretrained(tmp_path / "merged")
    assert (model.config.method["method"], model.config.method["combine"]) == ("mirror", "first")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 16, 16)).logits.isfinite().all()


def test_a_name_that_is_taken_is_an_error(tmp_path: Path):
    own = (
        'from hf_zipit import register_method\nregister_method("zip", needs=set())(lambda correlation, experts: None)'
    )
    install(tmp_path, "twin", own)
    again = "from hf_zipit.errors import ZipItError\nfrom hf_zipit.registry import METHODS\n" + (
        "for _ in range(2):\n    try: print('zip' in METHODS)\n    except ZipItError as error: print(error)"
    )
    done = fresh(tmp_path, again)
    assert done.returncode == 0, done.stderr
    message = "The plugin twin cannot be used: There are two methods named 'zip'; rename one of them."
    assert done.stdout.splitlines() == [message, message]
