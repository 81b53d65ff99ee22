"""LoRA experts: their update is added to the base, their classifier is kept, and what was passed stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import hf_zipit
from hf_zipit.errors import ExpertError
from hf_zipit.experts.loading import load_expert
from tests import tiny

peft = pytest.importorskip("peft")

TARGETS = {"bert-sequence": ["query", "value"], "vit": ["q_proj", "v_proj"]}


def adapted(name: str, base: Path, labels: int, seed: int, task_type: str | None = None) -> torch.nn.Module:
    """A LoRA adapter in general position, on a base that is saved, with a classifier of its own."""
    model_class = type(tiny.build(name))
    torch.manual_seed(seed)
    model = model_class.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    settings = peft.LoraConfig(
        r=2, target_modules=TARGETS[name], modules_to_save=["classifier"], task_type=task_type, lora_alpha=8
    )
    found = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.normal_(std=0.3)
    return found


def inputs(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    if name == "vit":
        return {"pixel_values": torch.randn(8, 3, 16, 16)}
    return {"input_ids": torch.randint(3, 50, (8, 7))}


@pytest.fixture(params=TARGETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(name: str, tmp_path: Path) -> Path:
    tiny.build(name, 0).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def assert_computes(model: PreTrainedModel, adapter: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(name)).logits, adapter(**inputs(name)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_saved_adapter_is_a_plain_expert_that_computes_the_same(name: str, base: Path, tmp_path: Path, labels: int):
    adapter = adapted(name, base, labels, 1, "SEQ_CLS" if name == "bert-sequence" else None)
    adapter.save_pretrained(tmp_path / "lora")
    found = load_expert("a", tmp_path / "lora")
    assert type(found) is type(tiny.build(name))
    assert found.config.num_labels == labels  # which the adapter does not say
    assert not any("lora" in key for key, _ in found.named_modules())
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert found.name_or_path == str(tmp_path / "lora")
    assert_computes(found, adapter, name)


def test_the_labels_come_from_a_configuration_beside_the_adapter(name: str, base: Path, tmp_path: Path):
    adapter = adapted(name, base, 3, 1)
    adapter.save_pretrained(tmp_path / "lora")
    config = copy.deepcopy(adapter.base_model.model.config)
    config.id2label = {0: "coat", 1: "bag", 2: "hat"}
    config.save_pretrained(tmp_path / "lora")
    found = load_expert("a", str(tmp_path / "lora"))
    assert found.config.id2label == {0: "coat", 1: "bag", 2: "hat"}
    assert_computes(found, adapter, name)


def test_a_model_of_peft_is_an_expert_and_stays_as_it_is(name: str, base: Path):
    adapter = adapted(name, base, 3, 1)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    found = load_expert("a", adapter)
    assert_computes(found, adapter, name)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    after = adapter.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_adapters_are_merged_with_each_other(name: str, base: Path, tmp_path: Path):
    adapters = {task: adapted(name, base, n, seed) for seed, (task, n) in enumerate({"a": 2, "b": 3}.items())}
    for task, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / task)
    merged = hf_zipit.merge({"a": tmp_path / "a", "b": adapters["b"]}, inputs(name), method="permute", depth=0.0)
    for task, adapter in adapters.items():  # nothing is shared: they stand side by side
        with torch.no_grad():
            expected = adapter(**inputs(name)).logits
            torch.testing.assert_close(merged(**inputs(name), task=task).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.method["experts"]["a"]["model"] == str(tmp_path / "a")


def test_adapters_that_change_no_weights_are_refused():
    model = tiny.build("bert-sequence")
    prompts = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ExpertError, match="'a' .*does not change weights") as raised:
        load_expert("a", prompts)
    assert "\n" not in str(raised.value)


def test_a_model_with_adapters_inside_is_refused(base: Path, name: str):
    model = type(tiny.build(name)).from_pretrained(base)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS[name]))
    with pytest.raises(ExpertError, match="carries adapters beside its weights"):
        load_expert("a", model)


def test_without_peft_it_says_how_to_install_it(
    base: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import sys

    adapted(name, base, 2, 1).save_pretrained(tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExpertError, match=r"the expert 'a' .*pip install 'hf-zipit\[peft\]'"):
        load_expert("a", tmp_path / "lora")


def test_an_adapter_without_the_classifier_that_its_base_lacks_is_refused(tmp_path: Path):
    tiny.build("vit-features").save_pretrained(tmp_path / "base")
    model = type(tiny.build("vit")).from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ExpertError, match="classifier.bias of the expert 'a' is neither in the adapter .*nor in its"):
        load_expert("a", tmp_path / "lora")


def test_an_adapter_whose_base_is_missing_is_one_sentence(base: Path, name: str, tmp_path: Path):
    adapted(name, base, 2, 1).save_pretrained(tmp_path / "lora")
    base.rename(tmp_path / "moved")
    with pytest.raises(ExpertError, match="the base .*base of the expert 'a' could not be loaded") as raised:
        load_expert("a", tmp_path / "lora")
    assert "\n" not in str(raised.value)


KINDS = {
    "dora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS["bert-sequence"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS["bert-sequence"]),
    "ia3": lambda: peft.IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS["bert-sequence"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds_are_merged_into_their_base_as_well(kind: str, tmp_path: Path):
    tiny.build("bert-sequence").save_pretrained(tmp_path / "base")
    base = type(tiny.build("bert-sequence")).from_pretrained(tmp_path / "base")
    adapter = peft.get_peft_model(base, KINDS[kind]()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        before = tiny.build("bert-sequence")(**inputs("bert-sequence")).logits
        assert (adapter(**inputs("bert-sequence")).logits - before).abs().max() > 1e-5
    adapter.base_model.peft_config["default"].auto_mapping = {"base_model_class": type(base).__name__}
    adapter.save_pretrained(tmp_path / kind)
    assert_computes(load_expert("a", tmp_path / kind), adapter, "bert-sequence")
