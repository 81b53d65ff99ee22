"""bitsandbytes: of experts that it quantised the plain model is merged, and a merged model is loaded in 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_zipit
from hf_zipit.experts.loading import load_expert
from tests import tiny

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_expert_is_dequantised(tmp_path: Path, kind: str):
    plain = tiny.build("bert-sequence", 0, hidden_size=64, intermediate_size=128)
    plain.save_pretrained(tmp_path / "plain")
    quantised = type(plain).from_pretrained(tmp_path / "plain", quantization_config=KINDS[kind], device_map="cpu")
    quantised.save_pretrained(tmp_path / "quantised")
    tokens = {"input_ids": torch.randint(3, 50, (8, 7), generator=torch.Generator().manual_seed(0))}
    expected = quantised(**tokens).logits
    for given in (quantised, tmp_path / "quantised"):
        expert = load_expert("a", given)
        assert {parameter.dtype for parameter in expert.parameters()} == {torch.float32}
        assert torch.allclose(expert(**tokens).logits, expected, atol=2e-3)
    assert quantised.is_quantized  # what was passed stays as it was
    other = tiny.build("bert-sequence", 1, hidden_size=64, intermediate_size=128)
    merged = hf_zipit.merge({"a": quantised, "b": other}, tokens["input_ids"], method="permute")
    assert merged.config.source_config.to_dict().get("quantization_config") is None


def test_a_merged_model_is_loaded_in_8_bits(tmp_path: Path):
    experts = {task: tiny.build("llama", seed) for seed, task in enumerate("ab")}
    merged = hf_zipit.merge(experts, method="weights")
    merged.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    assert any(type(module).__name__ == "Linear8bitLt" for module in small.trunk.modules())
    for given in ({"task": "a"}, {}):
        wanted, found = merged(input_ids=ids, **given).logits, small(input_ids=ids, **given).logits.float()
        assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
