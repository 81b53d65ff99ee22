"""Quantised weights, by the libraries themselves: experts are merged as plain models, merged ones are loaded small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig, PreTrainedTokenizerFast, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_zipit
from hf_zipit.experts.loading import load_expert
from hf_zipit.experts.quantised import read_off
from tests import tiny

TEXTS = [" ".join(f"w{place * step % 40}" for place in range(30)) for step in range(1, 17)]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "pad_token_id": 0}  # as wide as kernels for four bits ask for


def library(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")


def bitsandbytes(**settings: bool | str) -> QuantizationConfigMixin:
    library("bitsandbytes")
    return BitsAndBytesConfig(**settings)


def torchao(kind: str) -> QuantizationConfigMixin:
    library("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    kinds = {
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int8": Int8WeightOnlyConfig,
        "float8": Float8WeightOnlyConfig,
    }
    return TorchAoConfig(kinds[kind]())


def gptq() -> QuantizationConfigMixin:
    library("optimum")
    library("gptqmodel")
    return GPTQConfig(bits=4, group_size=32, dataset=TEXTS, tokenizer=tokenizer())


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i + 1 for i in range(40)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def save_awq(plain: Path, folder: Path) -> None:
    """By the library that transformers reads AWQ with."""
    library("gptqmodel")
    import gptqmodel
    from gptqmodel.quantization import AWQConfig

    gptqmodel._default_cpu_workers = lambda: 4  # it asks for more than half of two cores
    tokenizer().save_pretrained(plain)
    model = gptqmodel.GPTQModel.load(str(plain), AWQConfig(bits=4, group_size=32), device="cpu", dtype=torch.bfloat16)
    model.quantize(TEXTS, batch_size=1)
    model.save(str(folder))


def save_compressed(plain: Path, folder: Path) -> None:
    """Four bits a weight, scales by group, as vLLM's tools write them."""
    library("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = AutoModelForCausalLM.from_pretrained(plain)
    groups = {"group_0": preset_name_to_scheme("W4A16", ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            grouped = module.weight.detach().reshape(*module.weight_scale.shape, -1)
            module.weight_scale.data.copy_(grouped.abs().amax(-1) / 7)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def save_by(settings: Callable[[], QuantizationConfigMixin]) -> Callable[[Path, Path], None]:
    """What quantises while it loads, and saves that."""

    def save(plain: Path, folder: Path) -> None:
        config = settings()
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)

    return save


LOADING = {
    "bitsandbytes, 4 bits": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, 8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "torchao, 8 bits": lambda: torchao("int8"),
    "torchao, 4 bits": lambda: torchao("int4"),
    "torchao, float8": lambda: torchao("float8"),
}
SAVING = {
    **{kind: save_by(settings) for kind, settings in LOADING.items()},
    "GPTQ": save_by(gptq),
    "AWQ": save_awq,
    "compressed-tensors": save_compressed,
}
ROUGH = {"AWQ": 2e-2, "bitsandbytes, 8 bits": 2e-2}  # a kernel in bfloat16; activations are rounded, too


def ids(seed: int = 0) -> Tensor:
    return torch.randint(1, 40, (8, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SAVING)
def test_a_quantised_expert_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.chdir(tmp_path)  # where gptqmodel writes its log
    tiny.build("llama", 0, **WIDE).save_pretrained(tmp_path / "plain")
    SAVING[kind](tmp_path / "plain", tmp_path / "quantised")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    expected = quantised(input_ids=ids()).logits.float()
    for given in (quantised, tmp_path / "quantised"):
        expert = load_expert("a", given)
        assert {parameter.dtype for parameter in expert.parameters()} == {torch.float32}
        assert torch.allclose(expert(input_ids=ids()).logits, expected, atol=ROUGH.get(kind, 5e-3))
    assert quantised.is_quantized  # what was passed stays as it was
    other = tiny.build("llama", 1, **WIDE)
    merged = hf_zipit.merge({"a": quantised, "b": other}, ids(), method="permute", refit=False)
    assert merged.config.source_config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize("kind", LOADING)
def test_a_merged_model_is_loaded_quantised(tmp_path: Path, kind: str):
    settings = LOADING[kind]()
    merged = hf_zipit.merge(
        {task: tiny.build("llama", seed, **WIDE) for seed, task in enumerate("ab")}, method="weights"
    )
    merged.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    plain = {nn.Linear: nn.Parameter}
    assert any(plain.get(type(m)) is not type(m.weight) for m in small.trunk.modules() if hasattr(m, "in_features"))
    for given in ({"task": "a"}, {}):
        wanted, found = merged(input_ids=ids(), **given).logits, small(input_ids=ids(), **given).logits.float()
        assert (found - wanted).abs().max() < 0.3 * wanted.abs().max()


class Eighths(nn.Module):
    """A layer as a library for quantisation has it: integers, a scale, and no tensor of a plain layer's name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", (linear.weight.detach() * 64).round().to(torch.int8).T.contiguous())
        self.register_buffer("shift", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.packed.to(x.dtype) / 64) + self.shift


@torch.no_grad()
def test_layers_of_any_library_are_read_off():
    model = tiny.build("bert-sequence", 0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layer." in name:
            model.set_submodule(name, Eighths(nn.Linear(module.in_features, module.out_features)))
    model.config.quantization_config = {"quant_method": "of somebody"}
    plain = read_off(model)
    assert sum(isinstance(module, Eighths) for module in model.modules()) > 6
    assert not any(isinstance(module, Eighths) for module in plain.modules())
    assert torch.allclose(plain(input_ids=ids()).logits, model(input_ids=ids()).logits, atol=1e-5)
    assert not hasattr(plain.config, "quantization_config")
