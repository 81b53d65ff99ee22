"""What is kept between layers stays within one budget at any depth; the report says how much data was used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_zipit import Calibration
from hf_zipit.align.stage import align_trunk
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.errors import DataError
from hf_zipit.merging import plan
from hf_zipit.refit.report import RefitReport
from hf_zipit.refit.stage import refit_trunk
from hf_zipit.refit.walk import Refitted
from tests import tiny

MIB = 2**20


def refitted(layers: int, samples: int, memory_gb: float) -> Refitted:
    models = {name: tiny.build("vit", seed, num_hidden_layers=layers) for seed, name in enumerate("ab")}
    pixels = torch.randn(2, samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    planned = plan(models, method="identity", refit={"rows_per_input": 4, "micro_batch": 8})
    calibration = Calibration(dict(zip("ab", pixels, strict=True)), memory_gb=memory_gb).read(models)
    maps = align_trunk(planned)
    return refit_trunk(planned, combine_trunk(planned, maps), maps, calibration)


def test_activations_stay_within_the_calibrations_budget_at_any_depth():
    free, bounded = refitted(2, 16, 4.0), refitted(2, 16, MIB / 2**30)
    assert bounded.peak_bytes <= MIB < free.peak_bytes
    for name, tensor in free.tensors.items():
        assert torch.equal(tensor, bounded.tensors[name]), name
    assert refitted(1, 16, 4.0).peak_bytes == free.peak_bytes


def test_report_says_how_many_rows_were_used():
    report = refitted(1, 48, 4.0).report
    for module, (used, known) in report.rows.items():
        assert 0 < used <= known, module
    assert any(used < known for used, known in report.rows.values())  # 4 rows an input of 96 samples x 17 positions
    assert "rows_per_input" in report.rows_in_words()
    for used, told in (((10, 10), "10 of at most 20 rows in 2"), ((10, 12), "10 to 12 of at most 20 rows in 2")):
        rows = dict(zip("ab", ((each, 20) for each in used), strict=True))
        assert dataclasses.replace(report, rows=rows).rows_in_words().startswith(told)
    assert RefitReport.from_dict(report.to_dict()).rows == report.rows


def test_budget_is_above_zero():
    with pytest.raises(DataError, match="memory_gb must be above 0"):
        Calibration([], memory_gb=0)
