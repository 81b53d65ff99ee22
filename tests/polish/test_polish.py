"""Polish: what training does to a merged model, and what it must not do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from hf_zipit import MergeConfig, merge
from hf_zipit.config import PolishConfig
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.polish.loop import Loop, schedule
from hf_zipit.polish.samples import Samples, trim
from hf_zipit.recipe.sections import Recipe

from .. import tiny

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 16, 16, generator=GENERATOR)
TEXTS = {"input_ids": torch.randint(3, 6, (96, 5), generator=GENERATOR)}  # few tokens: there is something to learn
DATA = {"vit": IMAGES, "bert-masked": TEXTS, "resnet-basic": torch.randn(24, 3, 32, 32, generator=GENERATOR)}
FEW = {"steps": 6, "evaluate_every": 3, "batch_size": 4, "learning_rate": 1e-3}


@cache
def experts(name: str) -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair(name), strict=True))


def merged(name: str = "vit", data: Any = None, **settings: Any) -> nn.Module:
    data = dict.fromkeys("ab", DATA.get(name)) if data is None else data
    return merge(experts(name), data, **{"method": "permute", "refit": False, **settings})


@cache
def plain(name: str) -> nn.Module:
    return merged(name)


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["vit", "bert-masked"])
def test_the_held_out_loss_falls_and_says_so(name: str) -> None:
    found = merged(name, polish={**FEW, "batch_size": {"vit": 4, "bert-masked": 32}[name]})
    report = found.config.method["polished"]
    assert report["loss"][1] < report["loss"][0]
    assert (report["steps"], report["seed"]) == (6, 0) and report["best"] in (3, 6)
    assert report["samples"] == dict.fromkeys("ab", {"vit": [21, 3], "bert-masked": [84, 12]}[name])
    assert set(report["agreement"]) == {"a", "b"}
    assert not same(found, plain(name))
    assert found.config.method["polish"]["steps"] == 6


def test_a_seed_decides_the_result_and_none_is_off() -> None:
    assert same(merged(polish=FEW), merged(polish=FEW))
    assert not same(merged(polish=FEW), merged(polish=FEW, seed=1))
    off = merged(polish=False)
    assert same(off, plain("vit")) and "polished" not in off.config.method and MergeConfig().polish is None


def test_what_gets_worse_is_thrown_away() -> None:
    found = merged(polish={**FEW, "learning_rate": 1e3})
    report = found.config.method["polished"]
    assert report["best"] == 0 and report["loss"][0] == report["loss"][1]
    assert same(found, plain("vit"))


def test_it_stops_when_it_no_longer_gets_better() -> None:
    report = merged(polish={**FEW, "learning_rate": 1e3, "steps": 30, "patience": 2}).config.method["polished"]
    assert report["steps"] == 6


def test_broken_off_and_resumed_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {**FEW, "checkpoint": str(tmp_path / "state")}
    step = Loop._step

    def breaking(self: Loop, number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            merged(polish=kept)
    steps = []
    monkeypatch.setattr(Loop, "_step", lambda self, number: (steps.append(number), step(self, number)))
    resumed = merged(polish=kept)
    assert steps == [3, 4, 5]
    assert same(resumed, merged(polish=FEW))
    assert "checkpoint" not in resumed.config.method["polish"]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["polish.safetensors"]
    with pytest.raises(RecipeError, match="state of other experts, data or settings"):
        merged(polish=kept, seed=1)


def test_only_the_trunk_where_heads_are_left_alone() -> None:
    found, before = merged(polish={**FEW, "heads": False}).state_dict(), plain("vit").state_dict()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed and all(name.startswith("trunk.") for name in changed)
    assert any(name.startswith("branches.") and "classifier" in name for name in before)


def test_the_statistics_of_batch_norms_stay_as_corrected() -> None:
    corrections = ["batchnorm-reset"]
    found = merged("resnet-basic", polish=FEW, corrections=corrections)
    before = merged("resnet-basic", corrections=corrections)
    assert found.config.method["polished"]["loss"][1] < found.config.method["polished"]["loss"][0]
    for (name, new), old in zip(found.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old), name


@pytest.mark.parametrize("name", ["clip", "bert", "llama", "bert-token"])
def test_what_other_kinds_of_models_put_out(name: str) -> None:
    few = {"input_ids": TEXTS["input_ids"][:24], "pixel_values": IMAGES}
    data = few if name == "clip" else TEXTS
    found = merged(name, dict.fromkeys("ab", data), polish={**FEW, "batch_size": 32, "steps": 3})
    report = found.config.method["polished"]
    assert report["loss"][1] < report["loss"][0]
    assert bool(report["agreement"]) is (name != "bert")


def test_three_experts_whose_samples_nobody_knows() -> None:
    models = {task: tiny.build("vit", seed, num_labels=3) for seed, task in enumerate("abc")}
    found = merge(models, IMAGES, method="permute", refit=False, polish=FEW)
    report = found.config.method["polished"]
    assert report["samples"] == dict.fromkeys("abc", [21, 3]) and report["loss"][1] < report["loss"][0]


def test_a_perfect_copy_has_nothing_to_learn() -> None:
    model = tiny.build("vit", num_labels=3)
    found = merge({"a": model, "b": model}, IMAGES, method="identity", polish={**FEW, "steps": 1})
    assert found.config.method["polished"]["loss"][0] < 1e-6
    assert found.config.method["polished"]["agreement"]["a"][0] == 1


def test_nothing_is_left_behind() -> None:
    with torch.no_grad():
        found = merged(polish=FEW)
    models = [found, *experts("vit").values()]
    assert all(p.grad is None and p.requires_grad for model in models for p in model.parameters())
    assert not any(module.training for module in found.modules())
    assert not any(module._forward_pre_hooks for module in experts("vit")["a"].modules())


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's state, which keeps the first precision that it is asked for, is made again before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_is_the_accelerators() -> None:
    before = merged(polish=FEW)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = merge(
        experts("vit"), dict.fromkeys("ab", IMAGES), method="permute", refit=False, polish=FEW,
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
    )  # fmt: skip
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float32}
    assert not same(half, before)


def test_mistakes_are_told_in_a_sentence() -> None:
    with pytest.raises(DataError, match="polish trains on what the experts compute"):
        merge(experts("vit"), method="weights", polish=True)
    with pytest.raises(DataError, match="at least two of every task"):
        merged(data={"a": IMAGES, "b": IMAGES[:1]}, polish=FEW)
    for wrong in ({"steps": 0}, {"held_out": 1.0}, {"learning_rate": 0}, {"weight_decay": -1}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            PolishConfig(**wrong)
    with pytest.raises(RecipeError, match="polish.stepz is no known key"):
        MergeConfig(polish={"stepz": 3})


def test_the_card_calls_it_training(tmp_path: Path) -> None:
    merged(polish=FEW).save_pretrained(tmp_path / "trained")
    merged().save_pretrained(tmp_path / "merged")
    card, other = ((tmp_path / name / "README.md").read_text() for name in ("trained", "merged"))
    assert "## Training" in card and "Nothing was trained" not in card and "6 steps of AdamW" in card
    assert "answers of the expert, b | 1.000 | 1.000 |" in card
    assert "## Training" not in other and "Nothing was trained" in other
    recipe = yaml.safe_load((tmp_path / "trained" / "recipe.yaml").read_text())
    assert recipe["polish"]["steps"] == 6
    assert Recipe.from_dict(recipe).config("permute", 1.0).polish == PolishConfig(**FEW)
    assert "polish" not in yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())


def test_settings_come_back() -> None:
    config = MergeConfig(polish={"steps": 5, "checkpoint": "somewhere"})
    again = MergeConfig.from_dict(config.to_dict())
    assert again.polish == PolishConfig(steps=5) and MergeConfig(polish=True).polish == PolishConfig()


def test_every_pass_has_every_sample_once() -> None:
    class Data:
        def whole(self, task: str) -> dict[str, Tensor]:
            return {"x": torch.arange(10)}

    samples = Samples(Data(), ("a", "b"), 0.2, seed=3)  # type: ignore[arg-type]
    seen = {task: torch.cat([samples.batch(task, step, 4)["x"] for step in range(4)]) for task in "ab"}
    held_out = {task: torch.cat([batch["x"] for batch in samples.held_out(task, 1)]) for task in "ab"}
    for task in "ab":
        passes = seen[task].view(2, 8).sort(1).values
        assert torch.equal(passes[0], passes[1]) and not set(passes[0].tolist()) & set(held_out[task].tolist())
        assert len(held_out[task]) == 2
    assert not torch.equal(seen["a"], seen["b"])


def test_padding_that_no_sample_needs_is_cut() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    batch = trim(
        {"input_ids": torch.arange(10).view(2, 5), "attention_mask": mask, "pixel_values": torch.ones(2, 5, 5)}
    )
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch["pixel_values"].shape == (2, 5, 5)


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 1
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1 and 0 < rates[-1] < 0.01
