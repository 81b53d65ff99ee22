"""Where a device is full, a stage starts again with half as many samples at once, and the merge is that of so few."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from hf_zipit import Calibration, merge
from hf_zipit.refit.program import Program
from tests import tiny

MOST = 5
"""So many samples fit."""


def experts() -> dict[str, nn.Module]:
    models = (tiny.build("vit", seed, num_labels=labels, num_hidden_layers=1) for seed, labels in ((0, 3), (1, 4)))
    return dict(zip(("clothes", "shoes"), models, strict=True))


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and single ops that run out of memory where more than `MOST` samples go in."""

    def fitting(run: Any, samples: Any) -> Any:
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if samples(*args, **kwargs) > MOST:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return run(*args, **kwargs)

        return bounded

    call, run = nn.Module.__call__, Program.run
    monkeypatch.setattr(nn.Module, "__call__", fitting(call, lambda *_, pixel_values=(), **__: len(pixel_values)))
    monkeypatch.setattr(
        Program,
        "run",
        fitting(run, lambda program, node, lookup, tensors, inputs, *_, **__: len(inputs["pixel_values"])),
    )


def test_merge_goes_on_with_what_fits(
    small_device: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pixels = torch.randn(18, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    data = {"clothes": pixels[:10], "shoes": pixels[10:]}
    common = {"method": "permute", "row_fraction": 1.0}
    with caplog.at_level(logging.WARNING):
        found = merge(experts(), data, refit={"joint_heads": True}, **common)
    told = [record.getMessage() for record in caplog.records if "is full" in record.getMessage()]
    assert len(told) == 1 and "with 10 samples at once" in told[0]  # it is remembered from then on
    monkeypatch.undo()
    wanted = merge(experts(), data, refit={"joint_heads": True, "micro_batch": MOST}, batch_size=MOST, **common)
    for (name, tensor), other in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_one_sample_that_does_not_fit_is_an_error():
    calibration = Calibration(torch.zeros(4, 3, 16, 16)).read(experts())

    def work() -> None:
        calibration.batches()
        raise RuntimeError("MPS backend out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        calibration.while_it_fits(work)
    assert [batch.samples for batch in calibration.batches()] == [1, 1, 1, 1]
