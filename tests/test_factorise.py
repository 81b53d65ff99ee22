"""Factorisations side by side: the same as one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from threading import current_thread, main_thread

import pytest
import torch
from torch import Tensor

from hf_zipit.factorise import qr, side_by_side


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def matrices() -> list[Tensor]:
    drawn = torch.randn(9, 30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return list(drawn.requires_grad_())


def test_what_is_found_is_in_order_and_the_same(three_threads: None):
    expected = [qr(x.detach()) for x in matrices()]
    found = side_by_side(qr, matrices())
    assert torch.get_num_threads() == 3
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))
    assert not any(part.requires_grad for parts in found for part in parts)


def test_each_has_one_thread(three_threads: None):
    assert (
        side_by_side(lambda _: (current_thread() is main_thread(), torch.get_num_threads()), range(6))
        == [(False, 1)] * 6
    )
    assert side_by_side(lambda _: current_thread() is main_thread(), range(6), most=1) == [True] * 6


def test_what_goes_wrong_is_raised(three_threads: None):
    def fails(item: int) -> None:
        if item == 4:
            raise ValueError("4")

    with pytest.raises(ValueError, match="4"):
        side_by_side(fails, range(6))
