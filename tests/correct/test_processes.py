"""Several processes correct a model together: each ends up with the same tensors, and uses every sample once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.correct.worker import corrected


def test_two_processes_give_the_model_of_one(in_two_processes: Callable[[str], Path]):
    folder = in_two_processes("tests.correct.worker")
    one, two = (load_file(folder / f"{rank}.safetensors") for rank in (0, 1))
    alone = corrected(Accelerator(cpu=True))
    assert one.keys() == two.keys() == alone.keys()
    assert any(name.startswith("rescales.") for name in alone)
    for name, tensor in alone.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
