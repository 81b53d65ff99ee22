"""What a merge takes in forward passes: seconds by stage beside those of its experts, and memory beyond the models.

    python -m benchmarks.forward_passes                                     two random models of ViT-S's shape
    python -m benchmarks.forward_passes --experts A B --samples 512         two checkpoints of image classifiers

One forward pass is that of both experts over the images of both tasks, in the refit's own micro-batches. Seconds are
those of CPU in one thread, which say more than the clock on a busy machine; both are taken in one run, the forward
pass before and after the merge, of which the mean counts, and told beside what `expected_costs` says. Images are
random. The memory is what the process holds and cannot read again from a file (`RssAnon`, Linux), sampled while the
merge runs, beyond what it held before.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

from benchmarks.memory import resident
from benchmarks.stages import timed_stages
from hf_zipit import expected_costs, merge, plan
from hf_zipit.config import RefitConfig
from hf_zipit.refit import program
from hf_zipit.symmetry.trace import export as program_export

VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


def experts(folders: list[str], layers: int) -> dict[str, PreTrainedModel]:
    """Checkpoints, or random models of ViT-S's shape, in eval mode."""
    if folders:
        return {folder: AutoModelForImageClassification.from_pretrained(folder).eval() for folder in folders}
    made = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        made[name] = ViTForImageClassification(ViTConfig(**VIT_S | {"num_hidden_layers": layers})).eval()
    return made


def images(models: Mapping[str, PreTrainedModel], samples: int) -> dict[str, torch.Tensor]:
    """Random images by task."""
    config = next(iter(models.values())).config
    size, generator = getattr(config, "image_size", 28), torch.Generator().manual_seed(0)
    return {task: torch.randn(samples, config.num_channels, size, size, generator=generator) for task in models}


@torch.inference_mode()
def forward_seconds(models: Mapping[str, PreTrainedModel], data: Mapping[str, torch.Tensor]) -> float:
    """Seconds of CPU of one forward pass of all models over all images."""
    start = time.process_time()
    for model in models.values():
        for part in data.values():
            for batch in part.split(RefitConfig().micro_batch):
                model(pixel_values=batch)
    return time.process_time() - start


@contextmanager
def sampled_memory() -> Iterator[list[float]]:
    """The most anonymous memory in MiB beyond that at the start: a list of one number, when it ends."""
    start, peak, done = resident("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident("RssAnon") - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@contextmanager
def timed_tracing() -> Iterator[list[float]]:
    """Seconds of CPU that a refit exports a forward pass: a list of one number."""
    seconds = [0.0]

    def export(*args: Any) -> Any:
        start = time.process_time()
        try:
            return program_export(*args)
        finally:
            seconds[0] += time.process_time() - start

    with patch.object(program, "export", export):
        yield seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="*", default=[], help="checkpoints; random models of ViT-S's shape without")
    parser.add_argument("--samples", type=int, default=64, help="images a task")
    parser.add_argument("--layers", type=int, default=VIT_S["num_hidden_layers"], help="of the random models")
    settings = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    models = experts(settings.experts, settings.layers)
    data = images(models, settings.samples)
    merge(models, {task: part[:2] for task, part in data.items()}, refit=False)  # what is imported at first use
    before = forward_seconds(models, data)
    some = {"pixel_values": torch.cat([part[:2] for part in data.values()])}
    expected = expected_costs(plan(models, method="permute", refit=True), settings.samples, example_inputs=some)
    with timed_stages(time.process_time) as seconds, sampled_memory() as peak, timed_tracing() as tracing:
        start = time.process_time()
        merged = merge(models, data, method="permute", refit=True)
        total = time.process_time() - start
    forward = (before + forward_seconds(models, data)) / 2
    with torch.inference_mode():
        logits = torch.cat([merged(pixel_values=part[:8], task=task).logits for task, part in data.items()])
    shape = "checkpoints" if settings.experts else f"{settings.layers} x {VIT_S['hidden_size']}, random"
    print(f"{shape}, {settings.samples} images a task: a forward pass {forward:.1f} s, the merge {total:.1f} s, "
          f"{total / forward:.2f} forward passes; {peak[0]:,.0f} MiB beyond the models; "
          f"logits {float(logits.double().abs().sum()):.6f}")  # fmt: skip
    for stage, spent in seconds.items():
        told = expected.seconds.get({"moments_for": "observe", "refit_trunk": "refit"}.get(stage, ""), 0.0)
        more = f"  expected {told:7.2f} s, measured {spent / told:.2f} times that" if told else ""
        print(f"  {stage:16} {spent:7.2f} s  {spent / forward:5.2f}{more}")
    print(f"  of the refit {tracing[0]:.2f} s is tracing, which a process does once for inputs of one shape")
    print(f"  a forward pass was expected to take {expected.forward:.2f} s; {expected.lines()[0]}")


if __name__ == "__main__":
    main()
