"""Every test that takes `family` and `shared` runs on all families, with nothing, half and everything shared."""

from __future__ import annotations

import pytest

from .by_hand import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["none", "part", "whole"])
def shared(request: pytest.FixtureRequest, family: str) -> tuple[str, ...]:
    kind = FAMILIES[family]
    return {"none": (), "part": kind.part, "whole": kind.whole}[request.param]
