"""Factorisations of float64 matrices, each where it is fastest.

An accelerator takes milliseconds for a small singular value decomposition, most of it waiting; a CPU is done by then.
So small matrices come to the CPU and go back. There LAPACK gets one thread: with several on a busy machine it can be a
hundred times slower. Many small ones go side by side instead, each in a thread of its own (`side_by_side`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

SMALL = 512
"""Matrices with a side of fewer rows or columns than this are factorised on the CPU."""


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's work on the CPU in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


Item, Found = TypeVar("Item"), TypeVar("Found")


def side_by_side(function: Callable[[Item], Found], items: Iterable[Item], most: int | None = None) -> list[Found]:
    """What a function gives for every item, as many at a time as torch has threads, each of them in one thread.

    `most`: no more than so many at a time, if there is not memory for any number.
    """
    workers = min(torch.get_num_threads(), most or torch.get_num_threads())
    if workers == 1:
        with one_thread():
            return list(map(function, items))
    # A thread does not know of itself which accelerator is in use.
    at = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
    enter = partial(torch.accelerator.set_device_index, at) if at is not None else None
    with one_thread(), ThreadPoolExecutor(workers, initializer=enter) as pool:
        return list(pool.map(torch.no_grad()(function), items))


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[n, r]`, the singular values `[r]` and V^T `[r, m]` of x `[n, m]`, with r the smaller of n and m."""
    return _run(lambda x: torch.linalg.svd(x, full_matrices=False), x)


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q `[n, r]` and R `[r, m]` of x `[n, m]`."""
    return _run(torch.linalg.qr, x)


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues `[n]`, ascending, and eigenvectors `[n, n]` of a symmetric matrix."""
    return _run(torch.linalg.eigh, x)


def solve_positive(left: Tensor, right: Tensor, least: Tensor) -> Tensor:
    """The solution `[n, k]` of a system `[n, n]` that is positive definite but for rounding.

    Where rounding made it indefinite, its eigenvalues are taken to be no less than `least`.
    """
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(left)
        if not failed:
            return torch.cholesky_solve(right, factor)
    values, vectors = eigh(left)
    return vectors @ (vectors.mT @ right / values.clamp_min(least)[:, None])


def square_root(x: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """R `[n, n]` with R R^T = x, which is positive definite but for rounding (then see `solve_positive`), and R^-1."""
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(x)
        if not failed:
            eye = torch.eye(len(x), out=torch.empty_like(x))
            return factor, torch.linalg.solve_triangular(factor, eye, upper=False)
    values, vectors = eigh(x)
    root = values.clamp_min(least).sqrt()
    return vectors * root, (vectors / root).mT


def _run(factorise: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    with one_thread():
        if x.device.type != "cpu" and min(x.shape) < SMALL:
            return tuple(part.to(x.device) for part in factorise(x.cpu()))
        return tuple(factorise(x))
