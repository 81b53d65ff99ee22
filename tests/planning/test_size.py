"""A size in place of a depth: the largest merge that is no larger, and a sentence where there is none."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import pytest

from hf_zipit import MergeConfig, merge, plan
from hf_zipit.errors import RecipeError, SpecError
from hf_zipit.planning.cut import tower_lengths
from hf_zipit.symmetry import MergeSpec
from tests import tiny


@cache
def experts(name: str) -> dict[str, Any]:
    return dict(zip(("a", "b"), tiny.pair(name), strict=True))


@pytest.mark.parametrize("data", [False, True], ids=["without data", "with a refit's maps"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "resnet-basic", "clip"])
def test_the_least_depth_that_fits_is_taken(name, data):
    blocks = max(tower_lengths(MergeSpec.from_model(experts(name)["a"])))
    sizes = {}
    for merged in range(blocks + 1):
        with suppress(SpecError):
            found = plan(experts(name), data=data, depth=merged / blocks).parameters
            sizes[merged / blocks] = found["merged"] / found["expert"]
    assert len(sizes) > 1
    for size in (min(sizes.values()), sum(sizes.values()) / len(sizes), 3.0):
        found = plan(experts(name), data=data, size=size).config
        assert found.depth == min(depth for depth, own in sizes.items() if own <= size) and found.size is None


def test_the_merged_model_is_as_large_as_the_plan_says():
    merged = merge(experts("vit"), size=1.6)
    one = experts("vit")["a"].num_parameters()
    assert one < merged.num_parameters() <= 1.6 * one
    assert merged.config.depth == plan(experts("vit"), size=1.6, data=False).cut.depth < 1


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(RecipeError, match=r"size is 0.9; with all blocks merged.* the model is 1\.\d+ times"):
        plan(experts("vit"), size=0.9)
    with pytest.raises(RecipeError, match=r"size=1.5 .* depth=0.5; leave one out"):
        MergeConfig(size=1.5, depth=0.5)
    with pytest.raises(RecipeError, match="size is -1"):
        MergeConfig(size=-1)
