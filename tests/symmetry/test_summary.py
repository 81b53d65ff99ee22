"""The rows and counts that tables are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.summary import coverage, space_rows
from tests.tiny import build


def test_rows_of_a_small_network():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    model.register_buffer("idle", torch.zeros(7))
    spec = MergeSpec.from_model(model, {"input": torch.randn(2, 8)})
    rows = {(row["symmetry"], row["size"]): row for row in space_rows(spec, model)}
    assert rows["permutation", 16]["parameters"] == 16 * 8 + 16 + 4 * 16
    assert rows["permutation", 16]["frozen_by"] is None
    assert rows["fixed", 8]["parameters"] == 16 * 8
    assert rows["fixed", 8]["frozen_by"] == "the model's input input"
    assert rows["fixed", 4]["frozen_by"] == "the model's output output"
    assert coverage(spec, model) == {"movable": 16 * 8 + 16 + 4 * 16, "fixed": 4, "unused": 7}


def test_head_dims_are_counted_per_head():
    model = build("vit")
    spec = MergeSpec.from_model(model)
    rows = {row["name"]: row for row in space_rows(spec, model)}
    inner = rows["vit.layers.0.attention.q_proj"]
    assert (inner["symmetry"], inner["size"], inner["heads"]) == ("linear", 8, 4)
    assert inner["parameters"] == 2 * (32 * 32 + 32)
    assert rows["vit.residual"]["heads"] is None


@pytest.mark.parametrize("name", ["vit", "bert-masked", "resnet-basic"])
def test_coverage_counts_every_element_once(name):
    model = build(name)
    total = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert sum(coverage(MergeSpec.from_model(model), model).values()) == total
