"""A merge does not depend on what surrounds it, and leaves it as it was: settings of torch, threads, random states."""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_zipit
from benchmarks.memory import resident
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.running.run import cpu_threads

from . import tiny
from .faults.killing import EVERYTHING
from .test_invariants import calibration, outputs
from .test_invariants import experts as pair_in_general_position
from .tiny import pair


@cache
def inputs() -> Tensor:
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def experts() -> dict[str, nn.Module]:
    return dict(zip("ab", pair("vit"), strict=True))


def merged_hash() -> str:
    return fingerprint_experts({"": hf_zipit.merge(experts(), inputs())})[""]


@cache
def expected() -> str:
    return merged_hash()


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def coarse_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


AROUND = {
    "bfloat16 products": coarse_products,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "nothing": nullcontext,
}


@pytest.mark.parametrize("name", AROUND)
def test_the_merge_is_the_same_whatever_surrounds_it(name: str) -> None:
    before = expected()
    around: AbstractContextManager = AROUND[name]()
    with around:
        dtype = torch.get_default_dtype()
        assert merged_hash() == before
        assert torch.get_default_dtype() == dtype


def test_what_comes_out_of_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        merged = hf_zipit.merge(experts(), inputs())
    merged.train()(pixel_values=inputs(), task="a").logits.sum().backward()


def test_random_states_are_as_before() -> None:
    expected()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    merged_hash()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_experts_come_back_bit_for_bit() -> None:
    before = fingerprint_experts(experts())
    merged_hash()
    assert fingerprint_experts(experts()) == before
    assert all(parameter.requires_grad for parameter in experts()["a"].parameters())


def test_merges_in_threads_are_right_and_leave_initialisation_alone() -> None:
    before, threads = expected(), torch.get_num_threads()
    count = 32 if EVERYTHING else 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: merged_hash(), range(count)))
    assert found == [before] * count
    assert torch.get_num_threads() == threads
    weight = torch.zeros(4, 4)
    torch.nn.init.normal_(weight)
    assert weight.abs().sum() > 0


@pytest.mark.skipif(not EVERYTHING, reason="takes a minute")
def test_fifty_merges_hold_no_more_memory_than_ten() -> None:
    held = []
    for _ in range(50):
        merged_hash()
        gc.collect()
        tensors = sum(isinstance(each, Tensor) for each in gc.get_objects())
        held.append((resident("VmRSS"), tensors))
    print(f"MiB after 10 and 50 merges: {held[9][0]:.0f}, {held[49][0]:.0f}; tensors {held[9][1]}, {held[49][1]}")
    assert held[49][1] <= held[9][1]
    assert held[49][0] < held[9][0] + 16


SETTINGS = {
    "permute": {"method": "permute", "refit": False},
    "permute and refit": {"method": "permute", "refit": True},
    "zip": {"method": "zip", "refit": False},
}


@pytest.mark.skipif(not EVERYTHING, reason="two threads each in two processes wait for each other")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_another_number_of_threads_gives_nearly_the_same(settings: dict[str, Any]) -> None:
    """A regression's sums are cut up by threads; without one even the bits are the same."""
    identical, apart = 0, {}
    for name in tiny.EVERYTHING:
        models = dict(zip("ab", pair_in_general_position(name), strict=True))
        data, found = calibration(models["a"]), []
        for count in (1, 2):
            with cpu_threads(count):
                found.append(hf_zipit.merge(models, dict(data), **settings))
        one, two = ({t: outputs(merged, data, model, task=t) for t, model in models.items()} for merged in found)
        hashes = [fingerprint_experts({"": merged})[""] for merged in found]
        identical += hashes[0] == hashes[1]
        apart[name] = max(
            float((one[task][field] - two[task][field]).abs().max() / value.abs().max())
            for task in one
            for field, value in one[task].items()
        )
    worst = max(apart, key=apart.__getitem__)
    print(f"{identical} of {len(apart)} bit-identical; outputs differ by {apart[worst]:.1e} ({worst}) of the largest")
    assert identical == len(apart) or settings["refit"]
    assert apart[worst] <= 1e-3
