"""Tracing copies no weight."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.trace import select_outputs

STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_weights():
    warm = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    MergeSpec.from_model(warm, {"input": torch.randn(2, 8)})  # what torch.export loads once
    big = nn.Sequential(*(nn.Linear(2500, 2500) for _ in range(8)))  # 200 MB
    before = resident_bytes()
    spec = MergeSpec.from_model(big, {"input": torch.randn(2, 2500)})
    assert resident_bytes() - before < 50e6
    assert len(spec.axes) == 16


def test_a_model_on_the_meta_device_is_traced():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    spec = MergeSpec.from_model(model, {"input": torch.randn(2, 8)})
    (hidden,) = [space for space in spec.spaces.values() if spec.movable(space.name)]
    assert hidden.size == 16


def test_multiplications_are_counted():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    spec = MergeSpec.from_model(model, {"input": torch.randn(2, 8)})
    assert spec.samples == 2
    assert spec.macs == {"0": 2 * 8 * 16, "2": 2 * 16 * 4}


def test_modules_stand_in_execution_order():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).relu())

    spec = MergeSpec.from_model(Backwards(), {"x": torch.randn(2, 3)})
    assert spec.modules == ("first", "last")


def test_a_space_is_probed_where_it_is_read():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    spec = MergeSpec.from_model(model, {"input": torch.randn(2, 8)})
    (probe,) = spec.probes
    assert (probe.module, probe.where, probe.axis) == ("2", "input", -1)
    assert spec.size(probe.key) == 16


def test_all_that_a_detector_answers_counts_but_not_its_hidden_states():
    out = {name: torch.ones(2) for name in ("logits", "pred_boxes", "last_hidden_state")}
    assert set(select_outputs(out, None)) == {"logits", "pred_boxes"}
    del out["logits"]
    assert set(select_outputs(out, None)) == set(out)
