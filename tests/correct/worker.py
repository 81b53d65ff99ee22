"""One of several processes of `test_processes.py`: corrects a merged model and saves the tensors it ends up with."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from hf_zipit import merge
from tests import tiny

CORRECTIONS = ["batchnorm-reset", "repair", "rescale-shift"]


def corrected(accelerator: Accelerator) -> dict[str, Tensor]:
    """11 and 9 images in rounds of 10 and 10: as many for each of two processes, so that BatchNorm sees the same."""
    a, b = tiny.pair("resnet-basic")
    data = {
        "a": torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "b": torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(2)) + 1,
    }
    settings = {"method": "identity", "batch_size": 5}
    merged = merge({"a": a, "b": b}, data, corrections=CORRECTIONS, accelerator=accelerator, **settings)
    return {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}


def work(accelerator: Accelerator, folder: Path) -> None:
    save_file(corrected(accelerator), folder / f"{accelerator.process_index}.safetensors")
