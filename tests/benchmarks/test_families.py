"""The benchmark of families counts what is right, and what is not."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.families import Family, by_hf_zipit, by_mergekit
from benchmarks.programs import Program
from hf_zipit.merging import merge

CODE = """
def merge(settings):
    if settings["fails"]:
        raise ValueError("no such thing")
    print("words")
"""


def test_tensors_are_counted_as_right_that_are_what_the_rule_says_and_as_wrong_that_are_not(tmp_path: Path) -> None:
    family = Family("ResNetForImageClassification", tmp_path)
    names, rule = family.names, "task-arithmetic"
    assert {"resnet.embedder.embedder.normalization.running_mean", "classifier.1.weight"} <= set(names)
    merge(**family.settings(rule, tmp_path / "merged"))
    found = by_hf_zipit(family, tmp_path / "merged")
    assert family.right(found, rule) == len(names)
    assert sorted(n for n in names if isinstance(found[n], dict)) == ["classifier.1.bias", "classifier.1.weight"]
    assert family.right(found, "average") < len(names) / 2  # its scale is not that of the mean
    kernel = "resnet.embedder.embedder.convolution.weight"
    for wrong in (found[kernel] * (1 + 1e-5), found[kernel][:1], {"a": found[kernel], "b": found[kernel]}):
        assert family.right({**found, kernel: wrong}, rule) == len(names) - 1
    swapped = dict(zip("ab", reversed(found["classifier.1.weight"].values()), strict=True))
    assert family.right({**found, "classifier.1.weight": swapped}, rule) == len(names) - 1
    assert family.right({}, rule) == 0
    # A model without heads for tasks is loaded by its own class; the base is what nothing was added to.
    own = by_mergekit(family, tmp_path / "base")
    assert all(torch.equal(own[name], tensor) for name, tensor in family.base.state_dict().items())
    assert family.right(own, rule) == 0


def test_a_program_that_fails_once_goes_on_and_its_memory_is_measured() -> None:
    found = Program(CODE, sys.executable).run([{"fails": True}, {"fails": False}])
    assert [one["error"] for one in found] == ["ValueError: no such thing", None]
    assert all(one["peak_mib"] >= one["import_mib"] > 0 for one in found)
