"""Least squares from moments against least squares from the rows themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from hf_zipit.refit.regression import (
    PROBED,
    TRIANGLE,
    ChannelSums,
    Gram,
    SecondMoments,
    ridge,
    scale_and_shift,
    some_rows,
)

INPUTS, OUTPUTS, ROWS = 5, 3, 200


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """x with unlike scales and means, y that x explains in part, weights; all in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1, 2, 0.5, 3, 1.0]) + torch.tensor([0, 3, -1, 0, 5.0])
    y = x @ torch.randn(INPUTS, OUTPUTS, generator=generator, dtype=torch.float64) + 2
    y = y + 0.3 * torch.randn(ROWS, OUTPUTS, generator=generator, dtype=torch.float64)
    return x, y, torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.1


@pytest.fixture
def prior() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gram_of(x: Tensor, y: Tensor, weight: Tensor) -> Gram:
    gram = Gram(x.shape[1], y.shape[1])
    gram.add(x, y, weight.to(x.dtype))
    return gram


def moments_of(x: Tensor, y: Tensor, weight: Tensor) -> SecondMoments:
    return gram_of(x, y, weight).reduce()


def explicit(x: Tensor, y: Tensor, weight: Tensor, prior: Tensor, strength: float, intercept: bool):
    """The same problem with a row for every sample and one for every penalty, solved by `lstsq`."""
    root = weight.sqrt()[:, None]
    ones = torch.ones(len(x), int(intercept), dtype=x.dtype)
    mean = (weight[:, None] * x).sum(0) / weight.sum() if intercept else torch.zeros(x.shape[1], dtype=x.dtype)
    penalty = strength * (weight[:, None] * (x - mean).square()).sum(0).mean()
    left = torch.cat([torch.cat([x, ones], 1) * root, penalty.sqrt() * torch.eye(x.shape[1], x.shape[1] + intercept)])
    right = torch.cat([y * root, penalty.sqrt() * prior.T])
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution[: x.shape[1]].T, solution[x.shape[1]] if intercept else torch.zeros(y.shape[1], dtype=y.dtype)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("strength", [1e-9, 1e-2, 3.0])
def test_ridge_is_explicit_least_squares(rows, prior, strength: float, intercept: bool):
    found = ridge(moments_of(*rows), prior, strength, intercept)
    for ours, expected in zip(found, explicit(*rows, prior, strength, intercept), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_ridge_is_that_of_scikit_learn(rows):
    x, y, weight = rows
    plain = LinearRegression().fit(x.numpy(), y.numpy(), sample_weight=weight.numpy())
    slope, shift = ridge(moments_of(*rows), torch.zeros(OUTPUTS, INPUTS), 1e-12)
    torch.testing.assert_close(slope, torch.from_numpy(plain.coef_), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shift, torch.from_numpy(plain.intercept_), rtol=1e-6, atol=1e-6)

    centre = (weight[:, None] * x).sum(0) / weight.sum()
    alpha = 0.1 * (weight[:, None] * (x - centre).square()).sum(0).mean()
    penalised = Ridge(alpha=float(alpha)).fit(x.numpy(), y.numpy(), sample_weight=weight.numpy())
    slope, shift = ridge(moments_of(*rows), torch.zeros(OUTPUTS, INPUTS), 0.1)
    torch.testing.assert_close(slope, torch.from_numpy(penalised.coef_), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shift, torch.from_numpy(penalised.intercept_), rtol=1e-6, atol=1e-6)


def test_a_strong_ridge_gives_the_prior_and_fits_the_intercept(rows, prior):
    x, y, weight = rows
    slope, shift = ridge(moments_of(*rows), prior, 1e9)
    torch.testing.assert_close(slope, prior, rtol=1e-6, atol=1e-6)
    left = ((y - x @ prior.T) * weight[:, None]).sum(0) / weight.sum()
    torch.testing.assert_close(shift, left, rtol=1e-5, atol=1e-5)


def test_an_exact_prior_stays(rows, prior):
    x, _, weight = rows
    y = x @ prior.T - 4
    for strength in (1e-6, 1.0):
        slope, shift = ridge(moments_of(x, y, weight), prior, strength)
        torch.testing.assert_close(slope, prior)
        torch.testing.assert_close(shift, torch.full((OUTPUTS,), -4.0, dtype=torch.float64))


def test_fewer_rows_than_inputs_stay_at_the_prior_where_nothing_is_known(prior):
    x = torch.zeros(2, INPUTS, dtype=torch.float64)
    x[0, 0], x[1, 0] = 1, -1
    slope, _ = ridge(moments_of(x, x[:, :1] * torch.tensor([[7.0, 8, 9]]), torch.ones(2)), prior, 1e-6)
    torch.testing.assert_close(slope[:, 1:], prior[:, 1:])
    torch.testing.assert_close(slope[:, 0], torch.tensor([7.0, 8, 9], dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_what_rounding_made_indefinite_is_left_to_the_penalty(prior):
    """A variance below zero, by more than the penalty, counts as zero; all else is solved as it would be."""
    x = (
        torch.eye(INPUTS, dtype=torch.float64).repeat(2, 1)
        * torch.tensor([1.0, -1]).repeat_interleave(INPUTS)[:, None]
    )
    basis = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(5)).double()).Q
    x[:, -1] = 0
    moments = moments_of(x @ basis.T, x @ torch.ones(INPUTS, OUTPUTS, dtype=torch.float64), torch.ones(len(x)))
    unseen = basis[:, -1]
    rounded = replace(moments, xx=moments.xx - 1e-3 * torch.outer(unseen, unseen))
    for given in (moments, rounded):
        slope, _ = ridge(given, prior, 1e-5)
        torch.testing.assert_close(slope @ unseen, prior @ unseen)
        torch.testing.assert_close(
            slope @ basis[:, :-1], torch.ones(OUTPUTS, INPUTS - 1).double(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("positions", range(2, 100))
def test_the_rows_that_are_looked_at_are_not_all_of_one_position(positions: int):
    """A first solution that is right everywhere is seen to be, though all samples have one class token."""
    x = torch.randn(64, positions, INPUTS, generator=torch.Generator().manual_seed(6))
    x[:, 0] = 0.5
    rows, prior = x.flatten(0, 1), torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(7))
    gram = Gram(INPUTS, OUTPUTS, prior)
    gram.add(rows, rows @ prior.T, torch.ones(len(rows)))
    assert gram.left.blocks and not gram.whole.blocks
    seen = torch.bincount(some_rows(rows) % positions, minlength=positions)
    assert seen.sum() == PROBED and seen.max() <= PROBED / 2 + 1


@pytest.mark.parametrize("intercept", [True, False])
def test_no_rows_at_all_give_the_prior(prior, intercept: bool):
    slope, shift = ridge(Gram(INPUTS, OUTPUTS).reduce(), prior, 1e-4, intercept)
    torch.testing.assert_close(slope, prior)
    assert not shift.any()


def test_a_weight_is_a_repetition(rows):
    x, y, _ = rows
    times = torch.arange(ROWS) % 3
    weighted = moments_of(x, y, times.double())
    repeated = moments_of(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), torch.ones(int(times.sum())))
    for name in ("xx", "xy", "x", "y", "n"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


def test_reduced_parts_are_the_whole(rows):
    """`all_reduce` is called once for every tensor, in the same order in every process: here two take turns."""
    first, second = (gram_of(*(tensor[i::2] for tensor in rows)) for i in range(2))
    sent: list[Tensor] = []
    second.reduce(lambda tensor: sent.append(tensor) or tensor)  # type: ignore[func-returns-value]
    reduced = first.reduce(lambda tensor: tensor + sent.pop(0))
    assert not sent
    whole = moments_of(*rows)
    for name in ("xx", "xy", "x", "y", "n"):
        torch.testing.assert_close(getattr(reduced, name), getattr(whole, name))


def test_many_rows_are_added_in_blocks():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(20_000, 2, generator=generator), torch.randn(20_000, 1, generator=generator)
    found = moments_of(x, y, torch.ones(20_000))
    torch.testing.assert_close(found.xx, x.double().T @ x.double(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.xy, x.double().T @ y.double(), rtol=1e-5, atol=1e-2)
    assert found.n == 20_000


@pytest.mark.parametrize("inputs", [TRIANGLE - 1, 2 * TRIANGLE, 2 * TRIANGLE + 3])
def test_moments_are_about_the_origin_and_both_triangles_are_there(inputs: int):
    """However far the rows are from it, and wherever the first ones are."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(60, n, generator=generator, dtype=torch.float64) + 5 for n in (inputs, 2))
    weight = torch.rand(60, generator=generator, dtype=torch.float64)
    gram = Gram(inputs, 2)
    for part in torch.arange(60).split(25):
        gram.add(x[part] + part[0], y[part], weight[part])
    x = x + torch.tensor([0.0, 25, 50]).repeat_interleave(25)[:60, None]
    found, weighted = gram.reduce(), weight[:, None] * x
    for ours, expected in zip(
        (found.xx, found.xy, found.x, found.y, found.n),
        (weighted.T @ x, weighted.T @ y, weighted.sum(0), weight @ y, weight.sum()),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("near", [True, False])
def test_moments_do_not_depend_on_what_is_subtracted_when(rows, prior, near: bool):
    """A first solution that helps is subtracted row by row, another one at the end; the same for moments of a mix."""
    x, y, weight = rows
    if near:
        y = x @ prior.T + 0.1 * y
    gram, plain = Gram(INPUTS, OUTPUTS, prior), moments_of(x, y, weight)
    gram.add(x, y, weight)
    assert bool(gram.left.blocks) == near
    found = gram.reduce()
    left = moments_of(x, y - x @ prior.T, weight)
    for name in ("xx", "xy", "x", "y", "n"):
        torch.testing.assert_close(getattr(found, name), getattr(left, name))
    for ours, expected in zip(ridge(found, 2 * prior, 0.1), ridge(plain, 2 * prior, 0.1), strict=True):
        torch.testing.assert_close(ours, expected)

    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(2, INPUTS, generator=generator, dtype=torch.float64)
    start = torch.randn(OUTPUTS, 2, generator=generator, dtype=torch.float64)
    mixed = x @ mix.T
    expected = moments_of(mixed, y - mixed @ start.T, weight)
    for name in ("xx", "xy", "x", "y", "n"):
        torch.testing.assert_close(getattr(found.mixed(mix, start), name), getattr(expected, name))
        torch.testing.assert_close(getattr(plain.mixed(mix, start), name), getattr(expected, name))


@pytest.mark.parametrize("strength", [1e-9, 0.5])
def test_scale_and_shift_is_a_regression_for_every_channel(rows, strength: float):
    x, y, weight = rows[0][:, :OUTPUTS], rows[1], rows[2]
    prior = torch.tensor([1.0, -2.0, 0.5])
    channels = ChannelSums.empty(OUTPUTS)
    for part in torch.arange(ROWS).split(64):
        channels.add(x[part], y[part], weight[part])
    scale, shift = scale_and_shift(channels, prior, strength)
    centre = (weight[:, None] * x).sum(0) / weight.sum()
    variances = (weight[:, None] * (x - centre).square()).sum(0) / weight.sum()
    for c in range(OUTPUTS):  # alone, a channel's own variance is the measure of its penalty
        own = strength * variances.mean() / variances[c]
        expected = explicit(x[:, [c]], y[:, [c]], weight, prior[[c]][:, None].double(), float(own), True)
        torch.testing.assert_close(torch.stack([scale[c], shift[c]]), torch.stack([e.flatten()[0] for e in expected]))


def test_scale_and_shift_pulled_hard_keeps_the_scale(rows):
    channels = ChannelSums.empty(OUTPUTS)
    channels.add(rows[0][:, :OUTPUTS], rows[1], rows[2])
    scale, _ = scale_and_shift(channels, torch.tensor([1.0, -2.0, 0.5]), 1e9)
    torch.testing.assert_close(scale, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), rtol=1e-6, atol=1e-6)
