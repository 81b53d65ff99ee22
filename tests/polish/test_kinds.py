"""What must hold for every kind of training, and what each promises."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import merge
from hf_zipit.combine.rules.ties import elected, elected_mean
from hf_zipit.config import MergeConfig, PolishConfig
from hf_zipit.errors import ExpertError, RecipeError
from hf_zipit.modeling import ZipItForImageClassification
from hf_zipit.polish.kind import Learnt
from hf_zipit.polish.state import Progress
from hf_zipit.registry import TRAININGS, options_of
from hf_zipit.symmetry.proof import model_tensors

from .. import tiny

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FEW = {"steps": 4, "evaluate_every": 2, "batch_size": 8, "learning_rate": 3e-3}

each_kind = pytest.mark.parametrize("kind", TRAININGS.names())


@cache
def base() -> nn.Module:
    return tiny.build("vit", 0, num_labels=3)


@cache
def experts() -> dict[str, nn.Module]:
    """Two models near one base."""
    found = {}
    for seed, task in enumerate("ab", start=1):
        found[task] = tiny.build("vit", 0, num_labels=3)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in found[task].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return found


def merged(polish: Any = None, models: dict[str, nn.Module] | None = None, **settings: Any) -> nn.Module:
    settings = {"method": "identity", "combine": "task-arithmetic", "base": base(), "corrections": (), **settings}
    return merge(models or experts(), dict.fromkeys("ab", IMAGES), polish=polish, **settings)


@cache
def plain(combine: str = "task-arithmetic") -> dict[str, Tensor]:
    return merged(combine=combine).state_dict()


def of(kind: str, **more: Any) -> dict[str, Any]:
    return {**FEW, "kind": kind, **more}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """What both have is the same to the bit."""
    return all(torch.equal(one[name], two[name]) for name in one.keys() & two.keys())


@each_kind
def test_the_held_out_loss_falls_and_the_card_says_trained(kind: str, tmp_path: Path) -> None:
    found = merged(of(kind))
    report = found.config.method["polished"]
    assert report["kind"] == kind and report["steps"] == 4
    assert report["loss"][1] < report["loss"][0] and report["best"] in (2, 4)
    adds = found.state_dict().keys() - plain().keys()
    assert not same(found.state_dict(), plain()) or any(found.state_dict()[name].any() for name in adds)
    found.save_pretrained(tmp_path)
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "## Training" in card and f"4 steps of AdamW: {TRAININGS.get(kind).about}" in card
    assert "Nothing was trained" not in card and TRAININGS.get(kind).loss in card


@each_kind
def test_as_it_starts_it_is_the_rule_and_what_gets_worse_is_thrown_away(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Progress.add
    monkeypatch.setattr(Progress, "add", lambda self, loss, agreement: add(self, loss + self.step, agreement))
    found = merged(of(kind))
    assert found.config.method["polished"]["steps"] == 4
    assert found.config.method["polished"]["best"] == 0
    assert same(found.state_dict(), plain())
    before = merged()
    for task in "ab":
        with torch.no_grad():
            wanted = before(pixel_values=IMAGES, task=task).logits
            torch.testing.assert_close(found(pixel_values=IMAGES, task=task).logits, wanted, rtol=1e-5, atol=1e-6)


@each_kind
def test_the_same_seed_gives_the_same_bytes(kind: str) -> None:
    one, two, other = (merged(of(kind), seed=seed).state_dict() for seed in (0, 0, 1))
    assert one.keys() == two.keys() and same(one, two)
    assert not same(one, other)


@each_kind
def test_experts_that_learnt_nothing_give_the_base(kind: str) -> None:
    found = merged(of(kind), models={"a": base(), "b": base()})
    own = model_tensors(base())
    for name, tensor in model_tensors(found.trunk).items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-5, atol=1e-5)


@each_kind
def test_broken_off_and_resumed_it_is_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_zipit.polish.loop import Loop

    step = Loop._step

    def breaking(self: Loop, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        step(self, number)

    kept = of(kind, checkpoint=str(tmp_path / "state"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_step", breaking)
        merged(kept)
    assert same(merged(kept).state_dict(), merged(of(kind)).state_dict())


@each_kind
def test_saved_and_loaded_it_computes_the_same(kind: str, tmp_path: Path) -> None:
    found = merged(of(kind))
    found.save_pretrained(tmp_path)
    again = ZipItForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        for task in ("a", "b", None):
            assert torch.equal(again(IMAGES, task=task).logits, found(IMAGES, task=task).logits)
    assert again.config.method["polish"]["kind"] == kind


def learnt(kind: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[nn.Module, Learnt]:
    """A merge before its training, and what would be learnt."""
    from hf_zipit.polish import loop

    seen: list[Any] = []
    monkeypatch.setattr(loop.Loop, "run", lambda self: seen.append(self) or self._measure() or self.progress)
    merged(of(kind, **settings))
    return seen[0].merged, seen[0].learnt


@pytest.mark.parametrize("kind", ["adamerging", "symerge", "concrete"])
def test_gradients_are_those_of_the_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences of the loss along one direction."""
    model, found = learnt(kind, monkeypatch)
    parameters = {n: p for n, p in found.parameters.items() if "branches" not in n and "entries" not in n}
    generator = torch.Generator().manual_seed(0)
    way = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(way[name], alpha=step)
        found.put(3)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(way[name], alpha=step)
        with torch.enable_grad():
            return found.distance("a", {"pixel_values": IMAGES}).loss

    for parameter in found.through:
        parameter.requires_grad_(True)
    loss(0.0).backward()
    found.pull()
    slope = float(sum((parameters[name].grad * way[name]).sum() for name in parameters))
    difference = float(loss(1e-2).detach() - loss(-1e-2).detach()) / 2e-2
    assert slope == pytest.approx(difference, rel=0.05) and abs(slope) > 1e-5
    assert all(p.grad is None for p in found.through)


def test_adamerging_is_the_base_and_multiples_of_the_task_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = learnt("adamerging", monkeypatch)
    (changes,) = found.parameters.values()
    with torch.no_grad():
        changes.copy_(torch.randn(changes.shape, generator=torch.Generator().manual_seed(0)))
    found.put(None)
    own, start = [model_tensors(expert) for expert in experts().values()], model_tensors(base())
    tensors = dict(model.trunk.named_parameters())
    assert len(tensors) == len(changes) > 10
    for row, name in zip(changes.detach(), sorted(tensors), strict=True):
        expected = start[name] + sum((0.4 + c) * (x[name] - start[name]) for c, x in zip(row, own, strict=True))
        torch.testing.assert_close(tensors[name].detach(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_task_wise_there_is_one_coefficient_for_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merged(of("adamerging", options={"layerwise": False})).config.method["polished"]["best"] > 0
    (changes,) = learnt("adamerging", monkeypatch, options={"layerwise": False})[1].parameters.values()
    assert changes.shape == (1, 2)


def test_after_ties_it_takes_the_elected_task_vectors() -> None:
    vectors = list(torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).double())
    limits = [0.3, 0.5, 0.1]
    trimmed = [v * (v.abs() >= limit) for v, limit in zip(vectors, limits, strict=True)]
    torch.testing.assert_close(sum(elected(vectors, limits)), elected_mean(trimmed))
    found = merged(of("adamerging"), combine="ties")
    assert found.config.method["polished"]["best"] > 0
    with torch.no_grad():
        untouched = merged(combine="ties").state_dict()
    changed = {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, untouched[name])}
    assert changed and all(name.startswith("trunk.") for name in changed)


@pytest.mark.parametrize("blocks", [False, True])
def test_surgery_leaves_the_trunk_and_corrects_what_tasks_read(blocks: bool, tmp_path: Path) -> None:
    found = merged(of("surgery", options={"rank": 3, "blocks": blocks}))
    assert found.config.method["polished"]["best"] > 0 and same(found.state_dict(), plain())
    names = {name.partition(".")[0] for name in found.state_dict().keys() - plain().keys()}
    assert names == {"surgery"} and len(found.surgery["trunk"]) == (2 if blocks else 0)
    with torch.no_grad():
        joint, before = found(IMAGES).logits, merged()(IMAGES).logits
        alone = torch.cat([found(IMAGES, task=task).logits for task in "ab"], 1)
    assert torch.equal(joint, before) if blocks else torch.allclose(joint, alone, atol=1e-5)
    assert not torch.allclose(alone, before)
    with pytest.raises(ExpertError, match="corrected per task"):
        found.expert("a")


def test_surgery_works_behind_a_refit_and_other_maps() -> None:
    models = dict(zip("ab", tiny.pair("vit"), strict=True))
    for settings in ({"refit": True}, {"method": "permute"}):
        found = merged(
            of("surgery", options={"blocks": True}), combine="average", base=None, models=models,
            **settings,
        )  # fmt: skip
        report = found.config.method["polished"]
        assert report["loss"][1] < report["loss"][0] or "refit" in settings  # which leaves little


def test_mistakes_are_told_before_any_work() -> None:
    for kind in (name for name in TRAININGS if TRAININGS.get(name).needs_base):
        with pytest.raises(RecipeError, match=f"polish='{kind}' learns how much of the experts' task vectors"):
            merged(kind, combine="average", base=None)
        with pytest.raises(RecipeError, match=f"polish='{kind}' goes on from task vectors.*refit=False"):
            merged(kind, refit=True)
    with pytest.raises(RecipeError, match="no kind of polish named 'adamergin'; did you mean 'adamerging'"):
        MergeConfig(polish="adamergin")
    with pytest.raises(RecipeError, match="'surgery' has no option 'rnak'; did you mean 'rank'"):
        MergeConfig(polish={"kind": "surgery", "options": {"rnak": 2}})
    with pytest.raises(RecipeError, match="no entropy to be learnt from"):
        text = {"input_ids": torch.randint(3, 50, (8, 7))}
        model = tiny.build("bert")
        merge(
            {"a": model, "b": model},
            text,
            method="identity",
            combine="task-arithmetic",
            base=model,
            polish="adamerging",
        )
    assert MergeConfig(polish="surgery").polish == PolishConfig(kind="surgery")
    assert MergeConfig.from_dict(MergeConfig(polish="symerge").to_dict()).polish == PolishConfig(kind="symerge")


@each_kind
def test_the_docs_name_it_with_its_options(kind: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "polish.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind}` |")]
    assert all(f"`{option}`" in row for option in options_of(TRAININGS.get(kind).function))
