"""Shared by the tests of the refit: every class is traced once."""

from __future__ import annotations

import pytest

import hf_zipit.planning.plan

from ..test_invariants import TracedOnce


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_zipit.planning.plan, "MergeSpec", TracedOnce)
