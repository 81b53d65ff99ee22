"""Merged models in ONNX: both exporters of torch write a graph that onnxruntime runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_zipit

from .. import tiny

pytest.importorskip("onnx", reason="onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Logits(nn.Module):
    """A model that takes and gives tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).logits


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("task", ["a", None])
def test_onnxruntime_computes_the_same(tmp_path, task, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    experts, pixels = dict(zip("ab", tiny.pair("vit"), strict=True)), torch.randn(2, 3, 16, 16)
    merged = hf_zipit.merge(experts, pixels.repeat(8, 1, 1, 1)).for_task(task)
    path = str(tmp_path / "merged.onnx")
    torch.onnx.export(Logits(merged), (pixels,), path, dynamo=dynamo, input_names=["pixels"])
    (found,) = runtime.InferenceSession(path).run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), merged(pixel_values=pixels).logits, atol=1e-4, rtol=1e-4)
