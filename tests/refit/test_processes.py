"""Two processes, each with half of the micro-batches, refit as one does with all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_zipit.schema import unpacked

from .worker import NAMES, READING, data, more, refitted


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_refit_as_one(in_two_processes: Callable[[str], Path], name: str):
    folder = in_two_processes("tests.refit.worker")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = refitted(name, None)
    finally:
        torch.set_num_threads(threads)
    for rank in (0, 1):
        if name in READING:
            tokens = load_file(folder / f"more-{rank}.safetensors")[name]
            assert len(tokens) == 36 and torch.equal(tokens, more(name, None))
        found = load_file(folder / f"{name}-{rank}.safetensors")
        errors = found.pop("errors")
        torch.testing.assert_close(errors, torch.tensor(unpacked(single.config.method["refit_errors"])["errors"]))
        assert found.keys() == single.state_dict().keys()
        both = copy.deepcopy(single)
        both.load_state_dict(found)
        for task, inputs in data(name).items():
            expected, logits = (model(**inputs, task=task).logits for model in (single, both))
            exact = 1e-5 if name == "gpt2" else 1e-6  # many steps
            assert (logits - expected).abs().max() <= exact * expected.abs().max()
        state = single.state_dict()
        for key, tensor in state.items():
            # Weights are less exact than what they compute where their inputs hardly vary: here attention is nearly
            # uniform. A small bias is what is left of larger activations, and as exact as the weight beside it.
            beside = state.get(f"{key.rpartition('.')[0]}.weight", tensor)
            size = max(float(part.double().abs().max()) for part in (tensor, beside))
            difference = (found[key] - tensor).double().abs().max()
            assert difference <= (1e-3 if name == "gpt2" else 1e-4) * size, f"{key}: {difference / size:.1e}"
