"""Heads: how similar two blocks of units are."""

from __future__ import annotations

import torch

from hf_zipit.align.heads import block_scores


def test_blocks_are_scored_by_the_best_assignment_inside_them():
    """Both of b's heads correlate as much with a's on average, but only one of them is a's head in another order."""
    similarity = torch.zeros(2, 4, 2, 4, dtype=torch.float64)
    similarity[0, :2, 1, :2] = 0.5
    similarity[0, :2, 1, 2:] = torch.eye(2).flip(0)
    similarity[1, :, 0, :] = similarity[0, :, 1, :].T
    found = block_scores(similarity, 2)
    assert found[0, 0, 1].tolist() == [1.0, 2.0]
    assert found[1, :, 0, 0].tolist() == [1.0, 2.0]
    assert not found[0, :, 0].any()
