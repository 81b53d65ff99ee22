"""Rooting: experts become models that start from one of them, and nothing else of them changes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import MergeConfig, merge, plan
from hf_zipit.align.stage import align_trunk
from hf_zipit.config import RootConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.polish.rooting import plain, root
from hf_zipit.polish.state import Progress
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors

from .. import tiny

DRAWN = torch.Generator().manual_seed(0)
DATA = {
    "vit": torch.randn(24, 3, 16, 16, generator=DRAWN),
    "bert-masked": {"input_ids": torch.randint(3, 6, (24, 5), generator=DRAWN)},
    "resnet-basic": torch.randn(24, 3, 32, 32, generator=DRAWN),
}
FEW = {"steps": 6, "evaluate_every": 3, "batch_size": 8}


@cache
def experts(name: str) -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair(name), strict=True))


def merged(name: str = "vit", models: Any = None, **settings: Any) -> nn.Module:
    settings = {"method": "weights", "refit": False, "corrections": (), **settings}
    return merge(models or experts(name), dict.fromkeys("ab", DATA[name]), **settings)


def inputs(name: str) -> dict[str, Tensor]:
    return DATA[name] if isinstance(DATA[name], dict) else {"pixel_values": DATA[name]}


@torch.no_grad()
def logits(model: nn.Module, name: str = "vit", **how: Any) -> Tensor:
    return model(**inputs(name), **how).logits


def rooted(name: str, anchor: str = "a", method: str = "weights", **more: Any) -> tuple[Any, Any, Any]:
    settings = {"refit": False, "corrections": (), "root": {"anchor": anchor, **FEW}, **more}
    planned = plan(experts(name), method=method, **settings)
    calibration = Calibration.of(dict.fromkeys("ab", DATA[name])).read(planned.experts)
    return root(planned, align_trunk(planned, None), calibration)


@pytest.mark.parametrize(
    ("name", "anchor", "depth"), [("vit", "b", 0.5), ("bert-masked", "a", 1), ("resnet-basic", "b", 1)]
)
def test_the_anchor_computes_what_it_did_and_the_others_nearly(name: str, anchor: str, depth: float) -> None:
    planned, maps, report = rooted(name, anchor, depth=depth)
    assert all(found.is_identity for found in maps.values())
    torch.testing.assert_close(
        logits(planned.folded[anchor], name), logits(experts(name)[anchor], name), rtol=1e-3, atol=1e-4
    )
    (other,) = report["experts"]
    assert {anchor, other} == {"a", "b"} and report["anchor"] == anchor
    found = report["experts"][other]
    assert found["loss"][1] < found["loss"][0] and found["best"] in (3, 6)
    assert list(found["samples"]) == [other] and not planned.bases


@pytest.mark.parametrize("anchor", ["a", "b"])
def test_a_rooted_expert_computes_what_was_learnt(anchor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head was tied to the embeddings, of which one is the expert's own and the other the anchor's."""
    students: list[nn.Module] = []
    monkeypatch.setattr(
        "hf_zipit.polish.rooting.plain", lambda model, task: students.append(model) or plain(model, task)
    )
    planned, _, report = rooted("bert-masked", anchor)
    (other,), (student,) = report["experts"], students
    found, wanted = logits(planned.folded[other], "bert-masked"), logits(student, "bert-masked", task=other)
    torch.testing.assert_close(found, wanted)
    assert (found - logits(experts("bert-masked")[other], "bert-masked")).abs().max() > 0.01
    few = {"attention_steps": 0, "unit_steps": 0, "answer_steps": 0, "written_samples": 0}
    assert merged("bert-masked", root={"anchor": anchor, **FEW}, refit=few).config.method["refit_errors"]


def test_a_rooted_expert_starts_from_the_anchors_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets worse is thrown away; its head then reads the anchor's trunk in the units that were paired."""
    add = Progress.add
    monkeypatch.setattr(Progress, "add", lambda self, loss, agreement: add(self, loss + self.step, agreement))
    planned, _, report = rooted("vit", "a")
    assert report["experts"]["b"]["best"] == 0
    own, others = (model.state_dict() for model in planned.folded.values())
    for name, tensor in own.items():
        assert torch.equal(tensor, others[name]) == (name in planned.cut.trunk), name
    torch.testing.assert_close(logits(merged(root={"anchor": "a", **FEW}), task="a"), logits(experts("vit")["a"]))


def test_rules_on_task_vectors_start_at_the_anchor() -> None:
    model = merged(combine="task-arithmetic", combine_options={"scale": 1e-7}, root={"anchor": "b", **FEW})
    torch.testing.assert_close(logits(model, task="b"), logits(experts("vit")["b"]), rtol=1e-3, atol=1e-4)
    assert "bases" not in model.config.method
    tall = merged(residues="t-switch", root={"anchor": "b", **FEW})
    assert {setting["task"] for setting in tall.config.residues} == {"a", "b"}


def test_the_card_and_the_record_call_it_training(tmp_path: Path) -> None:
    model = merged(root={"anchor": "a", **FEW}, combine="ties")
    model.save_pretrained(tmp_path)
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "all experts but that of a were trained from its weights" in card and "Nothing was trained" not in card
    assert "## Training" in card and "distance from the expert of b, 6 steps of AdamW" in card
    assert MergeConfig.from_pretrained(tmp_path).root == RootConfig(anchor="a", **FEW)
    assert model.config.method["rooted"]["experts"]["b"]["steps"] == 6


def test_the_same_seed_gives_the_same_bytes() -> None:
    one, two = (merged(root={"anchor": "a", **FEW}).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@torch.no_grad()
def test_a_reordered_copy_of_the_anchor_starts_as_itself() -> None:
    first = experts("vit")["a"]
    spec, copied = MergeSpec.from_model(first), copy.deepcopy(first)
    element = random_element(spec, torch.Generator().manual_seed(1), permutations_only=True)
    moved = apply_element(model_tensors(first), spec, element)
    for name, tensor in model_tensors(copied).items():
        tensor.copy_(moved[name])
    model = merged(models={"a": first, "b": copied}, root=FEW)
    assert not all(
        torch.equal(own, tensor) for own, tensor in zip(first.parameters(), copied.parameters(), strict=True)
    )
    assert model.config.method["rooted"]["experts"]["b"]["loss"][0] < 1e-6
    torch.testing.assert_close(logits(model, task="b"), logits(first), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "c"}, "root's anchor is 'c'; it must be one of a, b"),
        ({"root": {"steps": 0}}, "root's steps is 0; it must be at least 1"),
        ({"root": True, "polish": True}, "leave one of them out"),
        ({"root": True, "base": "a", "combine": "ties"}, "root makes one expert the base of all others"),
        ({"root": FEW, "method": "zip"}, "root needs pairs of units, but method='zip' groups"),
    ],
)
def test_mistakes_are_told(settings: dict[str, Any], message: str) -> None:
    if "base" in settings:
        settings = {**settings, "base": experts("vit")["a"]}
    with pytest.raises(RecipeError, match=message):
        merged(**settings)


def test_it_needs_samples() -> None:
    with pytest.raises(DataError, match="root trains experts on what they compute: pass a little unlabelled data"):
        merge(experts("vit"), method="weights", root=True)
    assert MergeConfig(root="shoes").root == RootConfig(anchor="shoes") and MergeConfig(root=False).root is None
    assert MergeConfig.from_dict(MergeConfig(root=True).to_dict()) == MergeConfig(root=True)
