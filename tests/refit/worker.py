"""One of several processes of `test_processes.py`: refits on its share of the data and saves what it ends up with."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit import Calibration, merge
from hf_zipit.data import written
from hf_zipit.schema import unpacked
from tests import tiny

NAMES = ("bert-sequence", "resnet-basic", "gpt2")  # answers are fitted of the last one alone

READING = ("gpt2", "bert-sequence")  # one writes


def data(name: str) -> dict[str, dict[str, Tensor]]:
    """Two tasks that take turns, so that each of two processes sees one task only; the last batches are not full."""
    generator = torch.Generator().manual_seed(1)

    def some(count: int) -> dict[str, Tensor]:
        if name.startswith("resnet"):
            return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
        return {"input_ids": torch.randint(3, 50, (count, 7), generator=generator)}

    return {"a": some(10), "b": some(9)}


def refitted(name: str, accelerator: Accelerator | None) -> PreTrainedModel:
    models = dict(zip("ab", tiny.pair(name), strict=True))
    config = {"micro_batch": 4, "rows_per_input": 4, "own_task_weight": 0.8, "ridge": 1e-2, "written_samples": 0,
              "attention_steps": 8, "unit_steps": 16, "answer_steps": 16}  # fmt: skip
    return merge(models, data(name), method="identity", refit=config, accelerator=accelerator, seed=5)


def more(name: str, accelerator: Accelerator | None) -> Tensor:
    """What an expert reads where it writes, or others are spliced."""
    models = dict(zip("ab", tiny.pair(name), strict=True))
    calibration = Calibration(data(name), accelerator=accelerator).read(models)
    return written.with_more(calibration, models, 16, seed=5)[0].whole("b")["input_ids"]


def work(accelerator: Accelerator, folder: Path) -> None:
    written.TOKENS = 2**8  # as in all tests
    tokens = {name: more(name, accelerator) for name in READING}
    save_file(tokens, folder / f"more-{accelerator.process_index}.safetensors")
    for name in NAMES:
        model = refitted(name, accelerator)
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        tensors["errors"] = torch.tensor(unpacked(model.config.method["refit_errors"])["errors"])
        save_file(tensors, folder / f"{name}-{accelerator.process_index}.safetensors")
