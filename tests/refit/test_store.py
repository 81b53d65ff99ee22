"""Values beyond the budget go to files and come back the same; no file stays."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from hf_zipit.refit.values import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


VALUES = [
    torch.arange(6.0).reshape(2, 3),
    torch.arange(12.0).reshape(3, 4).T,
    torch.ones(1, 3).expand(5, 3),
    torch.tensor([True, False]),
    torch.tensor(3),
    torch.zeros(0, 2),
    torch.randn(4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value.dtype} {list(value.shape)}")
@pytest.mark.parametrize("budget", [0.5, 1e9])
def test_values_come_back(folder: Path, value: torch.Tensor, budget: float):
    with Store(budget) as store:
        store["a", 1] = value
        assert ("a", 1) in store and ("a", 2) not in store
        assert torch.equal(store["a", 1], value) and store["a", 1].dtype == value.dtype
        assert bool(files(folder)) == (budget < 1 and value.numel() > 0)
    assert not list(folder.iterdir())


def test_only_what_is_beyond_the_budget_goes_to_files(folder: Path):
    with Store(100) as store:
        for i in range(5):
            store[i] = torch.full((10,), float(i))  # 40 bytes
        assert len(files(folder)) == 3 and store.peak == 80
        store.pop(0)
        store[5] = torch.zeros(10)
        assert len(files(folder)) == 3 and store.peak == 80
        store.pop(4)
        store.pop("never there")
        assert len(files(folder)) == 2
        store[1] = torch.ones(3)
        assert torch.equal(store[1], torch.ones(3)) and [float(store[i][0]) for i in (2, 3)] == [2, 3]
    assert not list(folder.iterdir())


def test_tuples_are_counted_and_none_is_kept(folder: Path):
    with Store(1e9) as store:
        store["pair"] = (torch.zeros(10), [torch.zeros(5)])
        store["none"] = None
        assert store.peak == 60 and store["none"] is None
        assert torch.equal(store["pair"][1][0], torch.zeros(5))


def test_files_go_when_the_work_fails(folder: Path):
    with pytest.raises(RuntimeError, match="no"), Store(0.5) as store:
        store[0] = torch.ones(3)
        assert files(folder)
        raise RuntimeError("no")
    assert not list(folder.iterdir())
