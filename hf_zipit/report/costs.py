"""What a merge will cost: memory, bytes read and written, and seconds, before anything is run.

Operations are counted in the traced forward pass (`refit/work.py`) and divided by what one short matrix product takes
on the device. What works number by number is not counted, so that real merges take longer, by a factor that
`benchmarks/forward_passes.py` measures; `docs/guides/large_models.md` has it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from hf_zipit.adapters import example_inputs as inputs_of
from hf_zipit.adapters import given_inputs
from hf_zipit.config import RefitConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.data.processes import solving_device
from hf_zipit.data.written import further_count
from hf_zipit.observation.observe import FORWARD_SHARE
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.work import ForwardWork, Work, counted, forward_operations, refit_work
from hf_zipit.symmetry.proof import model_tensors

SIDE = 768
"""The measured product is of square matrices of this many rows,"""

TRIES = 12
"""and the fastest of so many counts: other work on the machine should not."""


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second of a matrix product: in float32, and in float64."""

    single: float
    double: float

    def seconds(self, work: Work) -> float:
        return work.single / self.single + work.double / self.double


@cache
def measured_rates(device: torch.device) -> Rates:
    """One short product of either kind on a device."""
    return Rates(_rate(torch.float32, device), _rate(torch.float64, solving_device(device)))


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    x = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(TRIES):
        start = time.perf_counter()
        float((x @ x)[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


@dataclass(frozen=True)
class Costs:
    """What a merge is expected to cost.

    Attributes:
        samples: calibration samples of each task, of the traced shape.
        seconds: by stage.
        memory: bytes by what they are for.
        read, written: bytes, of experts, of the merged model and of activations beyond the budget.
        forward: seconds of one forward pass of all experts over all samples.
    """

    samples: int
    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    read: float
    written: float
    forward: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: seconds, and whole bytes."""
        return {
            "samples": self.samples,
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "memory": {name: int(size) for name, size in self.memory.items()},
            "read": int(self.read),
            "written": int(self.written),
            "forward": round(self.forward, 3),
        }

    def lines(self) -> list[str]:
        """What is told to people."""
        stages = ", ".join(f"{name} {seconds_in_words(spent)}" for name, spent in self.seconds.items())
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.memory.items())
        told = [f"memory   {gigabytes(sum(self.memory.values()))} ({parts})"]
        told.append(f"disk     reads {gigabytes(self.read)}, writes {gigabytes(self.written)}")
        if self.samples and self.seconds:
            total = seconds_in_words(sum(self.seconds.values()))
            told.append(
                f"time     about {total} for {self.samples:,} samples a task of the traced shape ({stages}); one "
                f"forward pass of all experts over them {seconds_in_words(self.forward)}"
            )
        return told

    def __str__(self) -> str:
        return "\n".join(self.lines())


def expected_costs(
    planned: Plan,
    samples: int | None = None,
    device: torch.device | str = "cpu",
    memory_gb: float | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> Costs:
    """What a merge will cost, from one traced forward pass and one measured matrix product.

    Args:
        planned: what `hf_zipit.plan` returned.
        samples: calibration samples of each task; None or 0 where there are none.
        device: where it will run.
        memory_gb: the budget of what is kept between layers; the `Calibration`'s default without.
        example_inputs: keyword arguments of a forward pass, two samples or more, of the shape that counts; by default
            what the model's adapter makes up.
    """
    samples, experts, sizes = samples or 0, len(planned.tasks), planned.parameters
    refit = planned.config.refit if isinstance(planned.config.refit, RefitConfig) and planned.cut.trunk else None
    stored = sum(
        x.numel() * x.element_size() for model in planned.experts.values() for x in model_tensors(model).values()
    )
    memory = {"experts": 4.0 * sizes["experts"] if samples else 0.0, "merged model": 4.0 * sizes["merged"]}
    read, written = float(stored), 4.0 * sizes["merged"]
    if not samples or not (refit or planned.passes):
        return Costs(samples, {}, memory, read, written, 0.0)
    with given_inputs(example_inputs):
        rates, found = measured_rates(torch.device(device)), counted(planned)
        inputs = inputs_of(planned.model)
    one = Work(single=experts * samples * found.forward * experts)
    seconds = {}
    if planned.passes:
        seconds["observe"] = rates.seconds(one.times(1 + FORWARD_SHARE))
        memory["moments"] = float(planned.moment_bytes)
    if refit is not None:
        models = planned.experts.values()
        samples += min(further_count(model, inputs, samples, refit.written_samples) for model in models)
        seconds["refit"] = rates.seconds(refit_work(planned, found, samples))
        budget = (refit.memory_gb or memory_gb or Calibration.memory_gb) * 2**30
        kept = activations(found, experts, experts * samples)
        memory |= {"activations": min(kept, budget), "regressions": regressions(found, experts, refit)}
        branches = sum(layer.site.aim.stream is not None for layer in found.layers)  # each makes new values
        spilled = max(kept - budget, 0.0) * max(branches, 1)
        read, written = read + 2 * spilled, written + spilled
    return Costs(samples, seconds, memory, read, written, rates.seconds(one))


def model_costs(model: nn.Module, device: torch.device | str = "cpu") -> dict[str, float]:
    """Of one model: float32 `bytes`, `operations` of a forward pass of one sample, and the `seconds` they take."""
    operations = forward_operations(model)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "bytes": size,
        "operations": operations,
        "seconds": measured_rates(torch.device(device)).seconds(Work(single=operations)),
    }


def model_costs_line(costs: Mapping[str, float]) -> str:
    """The same for people."""
    return (
        f"memory {gigabytes(costs['bytes'])} in float32; a forward pass of one sample of the traced shape takes "
        f"{costs['operations'] / 1e9:,.3g} billion operations, here about {costs['seconds']:.3g} s"
    )


def activations(found: ForwardWork, experts: int, samples: int) -> float:
    """Bytes that are kept between layers: streams before and after a branch, and the widest values inside it."""
    return samples * ((2 * experts + 3) * found.stream + (experts + 2) * found.widest)


def regressions(found: ForwardWork, experts: int, refit: RefitConfig) -> float:
    """Bytes of the largest regression's moments, factors and rows."""
    widths = [layer.inputs for layer in found.layers]
    if refit.choose_units:
        widths += [(experts + 1) * layers[-1].inputs for layers in found.mlps]
    width = max(widths, default=0)
    return 3 * 8.0 * width**2 + 4 * 4 * 8192.0 * width


def seconds_in_words(seconds: float) -> str:
    """`0.3 s`, `12 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gigabytes(size: float) -> str:
    """A size in bytes: `1.2 GiB`, or MiB where it is small."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
