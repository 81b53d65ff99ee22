"""The experts' answers as labels: whoever answers as the experts do is always right."""

from __future__ import annotations

import pytest
import torch

from hf_zipit.data.calibration import Calibration
from hf_zipit.data.held_out import held_out
from hf_zipit.errors import DataError
from hf_zipit.evaluation.measure import accuracy

from .. import tiny


@pytest.mark.parametrize("name", ["llama", "bert-masked", "bert-sequence"])
def test_experts_agree_with_themselves(name):
    experts = dict(zip("ab", tiny.pair(name), strict=True))
    data = Calibration({task: {"input_ids": torch.randint(5, 40, (6, 7))} for task in experts}).read(experts)
    found = held_out(data, experts, answers="experts")
    assert accuracy(experts, found.tasks).per_task == {"a": 1.0, "b": 1.0}


def test_inputs_that_an_expert_cannot_read_are_one_sentence():
    experts = dict(zip("ab", tiny.pair("vit"), strict=True))
    data = Calibration(torch.randn(4, 3, 24, 24)).read(experts)
    with pytest.raises(
        DataError, match="The expert 'a' cannot run on the samples that are held out: Input image size"
    ):
        held_out(data, experts, answers="experts")
