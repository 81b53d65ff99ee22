"""What a merge will cost is counted in the traced forward pass: torch's own count, its samples and its budget."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_zipit.adapters import example_inputs
from hf_zipit.merging import plan
from hf_zipit.refit.work import counted, forward_operations
from hf_zipit.report.costs import expected_costs
from tests import tiny


@pytest.mark.parametrize("kind", ["vit", "resnet-basic", "gpt2"])
def test_operations_are_those_that_torch_counts(kind: str):
    model = tiny.build(kind, 0)
    inputs = example_inputs(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    samples = len(next(iter(inputs.values())))
    assert forward_operations(model) * samples == pytest.approx(counter.get_total_flops())


def test_costs_follow_samples_and_budget():
    planned = plan({name: tiny.build("vit", seed) for seed, name in enumerate("ab")}, method="permute", refit=True)
    few, many = (expected_costs(planned, samples) for samples in (64, 640))
    assert many.forward == pytest.approx(10 * few.forward)
    assert few.seconds.keys() == {"observe", "refit"} and few.seconds["refit"] < many.seconds["refit"]
    found = counted(planned)
    assert len(found.mlps) == planned.model.config.num_hidden_layers and 0 < found.attention < found.forward
    bounded = expected_costs(planned, 640, memory_gb=1e-4)
    assert bounded.memory["activations"] == 1e-4 * 2**30 < many.memory["activations"]
    assert bounded.written > many.written and bounded.read > many.read
    assert "640 samples a task" in str(many)
    assert not expected_costs(plan(planned.experts, method="identity"), None).seconds
