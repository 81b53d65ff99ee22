"""Adapters of PEFT, merged: what is saved is what PEFT loads, and it computes what the full weights compute."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import MergedAdapters, merge_adapters
from hf_zipit.errors import DataError, ExpertError, OutputError, RecipeError
from hf_zipit.registry import LORA_RULES

from .. import tiny

peft = pytest.importorskip("peft")

DIFFERENT = {
    "a": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"]},
    "b": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"],
          "rank_pattern": {"layers.1.attention.q_proj": 1}, "alpha_pattern": {"layers.0.attention.q_proj": 7}},
}  # fmt: skip
"""Adapters of ViT that differ in everything."""


def adapted(name: str, seed: int, **settings: Any) -> nn.Module:
    """A LoRA adapter in general position, on the base of seed 0."""
    found = peft.get_peft_model(tiny.build(name, 0), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.normal_(std=0.3)
    return found


def inputs(name: str) -> dict[str, Tensor]:
    torch.manual_seed(9)
    if name in ("vit", "resnet-basic"):
        size = 16 if name == "vit" else 32
        return {"pixel_values": torch.randn(8, 3, size, size)}
    return {"input_ids": torch.randint(3, 50, (8, 7))}


@cache
def vits() -> dict[str, nn.Module]:
    return {task: adapted("vit", seed, **DIFFERENT[task]) for seed, task in enumerate("ab", start=1)}


@cache
def with_heads() -> dict[str, nn.Module]:
    return {
        task: adapted("vit", seed, **DIFFERENT[task], modules_to_save=["classifier"])
        for seed, task in enumerate("ab", start=1)
    }


@torch.no_grad()
def logits(model: nn.Module, name: str = "vit", **more: Any) -> Tensor:
    return model(**inputs(name), **more).logits


def full(adapter: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(adapter).merge_and_unload().state_dict()


def mean_of_full(adapters: dict[str, nn.Module], name: str) -> nn.Module:
    """The base with the average of the full updates."""
    states = [full(adapter) for adapter in adapters.values()]
    model = tiny.build(name, 0)
    model.load_state_dict({key: sum(own[key] for own in states) / len(states) for key in states[0]})
    return model


def settings_of(rule: str) -> dict[str, Any]:
    """Such that a rule is the average, where it can be."""
    spaces = {"core-space": {"combine": "average"}, "knots": {"combine": "average"}}
    data = {"calibration": inputs("vit")["pixel_values"]} if LORA_RULES.get(rule).needs_data else {}
    return {"rule": rule, "options": spaces.get(rule, {}), **data}


FAMILIES = {
    "vit": {"target_modules": ["q_proj", "fc1"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True},  # Conv1D, an embedding
    "resnet-basic": {"target_modules": r".*convolution"},
}


@pytest.mark.parametrize("rule", ["linear", "core-space", "knots"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_average_in_factors_is_the_average_of_full_updates(name: str, rule: str, tmp_path: Path) -> None:
    adapters = {t: adapted(name, s, r=s, lora_alpha=3, **FAMILIES[name]) for s, t in enumerate("ab", start=1)}
    merge_adapters(adapters, **settings_of(rule), output_dir=tmp_path / "out")
    found = peft.PeftModel.from_pretrained(tiny.build(name, 0), tmp_path / "out")
    expected = mean_of_full(adapters, name).state_dict()
    for key, tensor in full(found).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", LORA_RULES.names())
def test_what_is_saved_loads_in_peft_and_computes_what_the_full_weights_compute(rule: str, tmp_path: Path) -> None:
    found = merge_adapters(vits(), **settings_of(rule), output_dir=tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(tiny.build("vit", 0), tmp_path / "out").eval()
    assert not loaded.load_adapter(tmp_path / "out", "again").missing_keys
    torch.testing.assert_close(logits(found.model()), logits(loaded), rtol=1e-4, atol=1e-5)
    assert (logits(loaded) - logits(tiny.build("vit", 0))).abs().max() > 1e-3
    ranks = {layer: update.rank for layer, update in found.updates.items()}
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 5


@pytest.mark.parametrize("rule", LORA_RULES.names())
def test_copies_give_the_adapter_back(rule: str) -> None:
    one = vits()["b"]
    found = merge_adapters({"a": one, "b": one, "c": one}, **settings_of(rule))
    torch.testing.assert_close(logits(found.model()), logits(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", LORA_RULES.names())
def test_the_same_settings_give_the_same_bytes(rule: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        merge_adapters(vits(), **settings_of(rule), output_dir=tmp_path / folder)
    files = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in files[1:]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_files_and_loaded_adapters_are_the_same(tmp_path: Path) -> None:
    for task, adapter in vits().items():
        adapter.save_pretrained(tmp_path / task)
    one, two = merge_adapters([tmp_path / "a", str(tmp_path / "b")]), merge_adapters(vits())
    assert one.tasks == ("a", "b") and one.updates.keys() == two.updates.keys()
    for layer, update in one.updates.items():
        assert all(torch.equal(x, y) for x, y in zip(update, two.updates[layer], strict=True))


def test_every_task_keeps_its_head(tmp_path: Path) -> None:
    tiny.build("vit", 0).save_pretrained(tmp_path / "base")
    found = merge_adapters(with_heads(), base=str(tmp_path / "base"), output_dir=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    both = found.model()
    assert both.config.method["adapters"]["rule"] == "linear"
    for task, adapter in with_heads().items():
        loaded = peft.PeftModel.from_pretrained(tiny.build("vit", 0), tmp_path / "out" / task).eval()
        head = loaded.base_model.model.classifier.modules_to_save["default"].weight
        assert torch.equal(head, adapter.base_model.model.classifier.modules_to_save["default"].weight)
        for model in (
            found.expert(task),
            peft.PeftModel.from_pretrained(tiny.build("vit", 0), tmp_path / "out" / task),
        ):
            torch.testing.assert_close(logits(model.eval()), logits(loaded), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(both, task=task), logits(loaded), rtol=1e-4, atol=1e-5)


def test_heads_of_other_sizes_than_the_base_has(tmp_path: Path) -> None:
    tiny.build("vit", 0).save_pretrained(tmp_path / "base")
    for seed, (task, labels) in enumerate({"a": 4, "b": 5}.items()):
        model = type(tiny.build("vit")).from_pretrained(
            tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
        )
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
        torch.manual_seed(seed)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / task)
    found = merge_adapters({"a": tmp_path / "a", "b": tmp_path / "b"}, output_dir=tmp_path / "out")
    model = found.model()
    assert [logits(model, task=task).shape[1] for task in "ab"] == [4, 5]
    with pytest.raises(ExpertError, match="'a' does not fit the model that is given as base="):
        MergedAdapters(found.updates, found.adapters, {}, tiny.build("vit", 0)).expert("a")


def test_a_layer_that_one_adapter_has_counts_as_zero_for_the_others() -> None:
    found = merge_adapters(vits()).updates
    layer = "vit.layers.0.attention.v_proj"
    own = full(vits()["b"])[f"{layer}.weight"] - tiny.build("vit", 0).state_dict()[f"{layer}.weight"]
    torch.testing.assert_close((found[layer].b @ found[layer].a).float(), own / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_what_peft_itself_makes_of_them(kind: str) -> None:
    """Its `cat` is `linear`, and its `svd` is `linear` cut to a rank."""
    both = adapted("vit", 1, r=2, target_modules=["q_proj"])
    both.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"], lora_alpha=5))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in both.named_parameters():
            if ".other." in key:
                parameter.normal_(std=0.3)
    alone = {}
    for name in ("default", "other"):
        both.set_adapter(name)
        alone[name] = copy.deepcopy(both)
    rank = 3 if kind == "svd" else None
    found = merge_adapters(alone, options={"weights": {"default": 0.3, "other": 0.8}}, rank=rank)
    both.add_weighted_adapter(["default", "other"], [0.3, 0.8], "merged", combination_type=kind, svd_rank=rank)
    both.set_adapter("merged")
    for layer, update in found.updates.items():
        theirs = both.base_model.model.get_submodule(layer).get_delta_weight("merged")
        torch.testing.assert_close((update.b @ update.a).float(), theirs, rtol=1e-4, atol=1e-5)
        assert update.rank == (rank or 5)


OTHERS = {
    "DoRA": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "LOHA": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "LoRA with trained biases": lambda: peft.LoraConfig(target_modules=["q_proj"], bias="all"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_told_how_they_are_merged(kind: str, tmp_path: Path) -> None:
    other = peft.get_peft_model(tiny.build("vit", 0), OTHERS[kind]())
    other.save_pretrained(tmp_path / "b")
    for source in (other, tmp_path / "b"):
        with pytest.raises(ExpertError, match=f"'b' is of the kind {kind}, .*hf_zipit.merge merges such adapters"):
            merge_adapters({"a": vits()["a"], "b": source})


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="at least two adapters, but 1"):
        merge_adapters({"a": vits()["a"]})
    with pytest.raises(RecipeError, match="no LoRA rule named 'core'; choose one of core-space"):
        merge_adapters(vits(), rule="core")
    with pytest.raises(RecipeError, match="'linear' has no option 'weight'"):
        merge_adapters(vits(), options={"weight": 1})
    with pytest.raises(RecipeError, match="rank is 0"):
        merge_adapters(vits(), rank=0)
    with pytest.raises(DataError, match="pass a little unlabelled data"):
        merge_adapters(vits(), rule="ssr")
    with pytest.raises(RecipeError, match="reads no data; leave calibration="):
        merge_adapters(vits(), torch.randn(2, 3, 16, 16))
    with pytest.raises(ExpertError, match="'b' is a ViTForImageClassification; give a folder"):
        merge_adapters({"a": vits()["a"], "b": tiny.build("vit")})
    with pytest.raises(ExpertError, match="no adapter_config.json"):
        merge_adapters({"a": vits()["a"], "b": tmp_path})
    wider = peft.get_peft_model(tiny.build("vit", 0, hidden_size=16), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExpertError, match=r"q_proj is \(16, 16, 'layer'\) in the adapter 'b'"):
        merge_adapters({"a": vits()["a"], "b": wider})
    other = copy.deepcopy(vits()["b"])
    other.peft_config["default"].base_model_name_or_path = "me/other"
    first = copy.deepcopy(vits()["a"])
    first.peft_config["default"].base_model_name_or_path = "me/base"
    with pytest.raises(ExpertError, match="'b' is of the base me/other, and 'a' of me/base"):
        merge_adapters({"a": first, "b": other})
    assert merge_adapters({"a": first, "b": other}, base="me/base")
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="is not empty"):
        merge_adapters(vits(), output_dir=tmp_path)
