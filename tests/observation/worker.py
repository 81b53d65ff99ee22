"""One of several processes of `test_observe.py`: observes the same data and saves the moments it ends up with."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import ZipItError
from hf_zipit.observation import gather_moments
from tests.observation.models import vit, vit_spec


def calibration() -> dict[str, torch.Tensor]:
    """23 and 8 images: batches of 4 that no number of processes divides, the last one smaller."""
    return {
        "clothes": torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "shoes": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 1,
    }


def observe_and_save(accelerator: Accelerator, data: dict[str, torch.Tensor], path: Path) -> None:
    """Write the moments, or what went wrong."""
    experts = {"clothes": vit(1), "shoes": vit(2)}
    spec = vit_spec(experts["clothes"])
    try:
        read = Calibration(data, batch_size=4, accelerator=accelerator).read(experts)
        gather_moments(spec, experts, read, row_fraction=0.7, seed=3).save(path.with_suffix(".safetensors"))
    except ZipItError as error:
        path.with_suffix(".txt").write_text(str(error))


def work(accelerator: Accelerator, folder: Path) -> None:
    damaged = calibration()
    damaged["shoes"][0] = torch.nan  # batch 1: only the second process sees it
    observe_and_save(accelerator, calibration(), folder / f"good{accelerator.process_index}")
    observe_and_save(accelerator, damaged, folder / f"bad{accelerator.process_index}")
