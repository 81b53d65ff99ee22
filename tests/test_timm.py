"""timm's models, wrapped by transformers or as they are, where timm is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

import hf_zipit
from hf_zipit.errors import SpecError

timm = pytest.importorskip("timm", exc_type=ImportError)

VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
PIXELS = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def wrapped(seed: int, architecture: str = "vit_tiny_patch16_224", **settings: object) -> TimmWrapperConfig:
    torch.manual_seed(seed)
    config = TimmWrapperConfig(architecture=architecture, num_labels=2 + seed, model_args=settings or VIT)
    return TimmWrapperForImageClassification(config).eval()


@torch.no_grad()
def test_wrapped_experts_keep_their_heads_and_are_saved(tmp_path: Path):
    experts = {"a": wrapped(0), "b": wrapped(1)}
    apart = hf_zipit.merge(experts, depth=0)
    for task, expert in experts.items():
        assert torch.allclose(
            apart(pixel_values=PIXELS, task=task).logits, expert(pixel_values=PIXELS).logits, atol=1e-5
        )
    merged = hf_zipit.merge(experts, PIXELS, method="permute", depth=0.5, output_dir=tmp_path / "merged")
    assert merged.config.cut == "timm_model.blocks.1" and merged.config.num_labels == 5
    again = hf_zipit.ZipItForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(pixel_values=PIXELS).logits, merged(pixel_values=PIXELS).logits)


def test_blocks_are_one_chain_whose_symmetries_hold():
    model = wrapped(0, "convnext_atto", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])
    spec = hf_zipit.MergeSpec.from_model(model)
    assert spec.head == ("timm_model.head.fc",)
    assert [block.path for block in spec.blocks] == [f"timm_model.stages.{i}" for i in range(4)]
    assert hf_zipit.prove(model, spec) <= 1e-5


def test_timms_own_models_are_plain_modules():
    experts = {task: timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT).eval() for task in "ab"}
    merged = hf_zipit.merge(experts, PIXELS, example_inputs={"x": PIXELS[:2]})
    assert type(merged) is type(experts["a"])
    assert merged(PIXELS).shape == (8, 3)


def test_a_wrapper_without_a_head_is_refused_in_a_sentence():
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=0, model_args=VIT)
    with pytest.raises(SpecError, match="merge TimmWrapperForImageClassification, or timm's models themselves"):
        hf_zipit.plan({task: TimmWrapperModel(config) for task in "ab"}, data=False)
