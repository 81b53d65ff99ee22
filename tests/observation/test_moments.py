"""Moments: exactness, additivity, dead units, several probes, and the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_zipit.errors import DataError, ExpertError, OutputError, SpecError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.observation import Moments
from hf_zipit.observation import file as file_module
from hf_zipit.observation import moments as moments_module
from tests.observation.models import HIDDEN, covariance, mlps

VECTOR = Path(__file__).parents[1] / "vectors" / "zipit_covariance_metric.npz"
TASKS = ("clothes", "shoes")


def moments_of(*features: torch.Tensor, probe: str = "") -> Moments:
    moments = Moments(TASKS[: len(features)])
    moments.add(HIDDEN, features, probe)
    return moments


def features(rows: int, mean: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 4, generator=generator)
    return [mean + base, mean + base.roll(1, 1) + 0.3 * torch.randn(rows, 4, generator=generator)]


def test_published_covariance():
    with np.load(VECTOR) as file:
        a, b, expected = (torch.from_numpy(file[name]) for name in ("featsA", "featsB", "cov"))
        sizes, positions = file["batch_sizes"].tolist(), int(file["positions_per_image"])
    rows = [size * positions for size in sizes]
    assert sum(rows) == a.shape[1] == 189
    moments = Moments(TASKS)
    for block_a, block_b in zip(a.T.split(rows), b.T.split(rows), strict=True):
        moments.add(HIDDEN, [block_a, block_b])
    assert moments.count(HIDDEN) == 189
    torch.testing.assert_close(moments.covariance(HIDDEN), expected.double(), atol=5e-7, rtol=0)


@pytest.mark.parametrize("narrow", [0, 256])
@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_large_mean_keeps_the_variance(mean: float, block: int, narrow: int, monkeypatch: pytest.MonkeyPatch):
    """In both arithmetics, those of wide and of narrow spaces."""
    monkeypatch.setattr(moments_module, "BLOCK_ROWS", block)
    monkeypatch.setattr(moments_module, "NARROW", narrow)
    both = features(500, mean)
    moments = Moments(TASKS)
    for a, b in zip(both[0].split(100), both[1].split(100), strict=True):
        moments.add(HIDDEN, [a, b])
    rows = torch.cat(both, 1).double()
    torch.testing.assert_close(moments.covariance(HIDDEN), covariance(rows), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moments.mean(HIDDEN), rows.mean(0), atol=1e-6, rtol=1e-9)
    torch.testing.assert_close(moments.std(HIDDEN), rows.std(0, correction=0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moments.correlation(HIDDEN), torch.corrcoef(rows.T), atol=1e-6, rtol=0)


def test_concatenated_data_is_merged_moments():
    one, two = features(60, mean=100, seed=1), features(40, mean=-50, seed=2)
    whole = moments_of(*[torch.cat(pair) for pair in zip(one, two, strict=True)])
    parts = moments_of(*one), moments_of(*two)
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert merged.count(HIDDEN) == 100
        torch.testing.assert_close(merged.covariance(HIDDEN), whole.covariance(HIDDEN), atol=1e-4, rtol=1e-6)
    before = parts[0].covariance(HIDDEN)
    parts[0].merge(parts[1]).add(HIDDEN, one)
    assert torch.equal(parts[0].covariance(HIDDEN), before)  # merging makes a new object


def test_merge_refuses_other_tasks_and_experts():
    moments, other = moments_of(*features(8)), Moments(("hats", "shoes"))
    with pytest.raises(DataError, match="hats"):
        moments.merge(other)
    moments.fingerprint["experts"] = {"clothes": "1", "shoes": "2"}
    changed = moments_of(*features(8))
    changed.fingerprint["experts"] = {"clothes": "1", "shoes": "3"}
    with pytest.raises(DataError, match="shoes"):
        moments.merge(changed)


@pytest.mark.parametrize("narrow", [0, 256])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1234.5])
def test_dead_units_correlate_with_nothing(constant: float, narrow: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moments_module, "NARROW", narrow)
    a, b = features(300)
    a[:, 2] = constant
    moments = Moments(TASKS)
    for part in zip(a.split(64), b.split(64), strict=True):
        moments.add(HIDDEN, part)
    correlation = moments.correlation(HIDDEN)
    assert moments.dead(HIDDEN).tolist() == [False, False, True, False] + [False] * 4
    assert not correlation[2].any() and not correlation[:, 2].any()
    alive = [0, 1, 3, 4, 5, 6, 7]
    rows = torch.cat([a, b], 1).double()[:, alive]
    torch.testing.assert_close(correlation[alive][:, alive], torch.corrcoef(rows.T), atol=1e-6, rtol=0)


def test_a_unit_that_only_rounds_is_dead():
    """One unit in the last place around 1e5 is a variance of 6e-5, far above the floor, and means nothing."""
    a, b = features(300)
    a[:, 1] = 1e5 + 0.0078125 * (torch.arange(300) % 2)
    moments = moments_of(a, b)
    assert moments.std(HIDDEN)[1] > 1e-3 and moments.dead(HIDDEN).nonzero().tolist() == [[1]]
    assert not moments.correlation(HIDDEN)[1].any()


def test_weak_units_correlate_as_strong_ones_do():
    """With a floor under s s^T a weak unit would resemble strong ones more than itself; what has no size is dead."""
    a, b = features(200)
    weak = moments_of(1e-5 * a, b)
    torch.testing.assert_close(weak.correlation(HIDDEN), moments_of(a, b).correlation(HIDDEN), atol=1e-5, rtol=0)
    assert moments_of(1e-15 * a, b).dead(HIDDEN).tolist() == [True] * 4 + [False] * 4


def test_probes_weigh_the_same_whatever_their_scale_and_count():
    small, large = features(50, seed=1), [1e3 * f for f in features(400, seed=2)]
    moments = moments_of(*small, probe="block0:output:-1")
    moments.add(HIDDEN, large, "block1:output:-1")
    assert moments.probes(HIDDEN) == ("block0:output:-1", "block1:output:-1")
    assert (moments.count(HIDDEN), moments.count(HIDDEN, "block0:output:-1"), moments.size(HIDDEN)) == (450, 50, 4)
    one, two = (torch.cat(f, 1).double() for f in (small, large))
    mean = (torch.corrcoef(one.T) + torch.corrcoef(two.T)) / 2
    torch.testing.assert_close(moments.correlation(HIDDEN), mean, atol=1e-6, rtol=0)
    pooled = (covariance(one) + covariance(two)) / 2
    torch.testing.assert_close(moments.pooled_covariance(HIDDEN), pooled, atol=0.1, rtol=1e-6)
    torch.testing.assert_close(moments.std(HIDDEN), pooled.diagonal().sqrt(), atol=1e-3, rtol=1e-6)
    torch.testing.assert_close(moments.covariance(HIDDEN, "block0:output:-1"), covariance(one), atol=1e-6, rtol=1e-6)
    with pytest.raises(SpecError, match="block2"):
        moments.covariance(HIDDEN, "block2")


def test_half_precision_rows_and_many_experts():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, 3, generator=generator).bfloat16() for _ in range(3)]
    moments = Moments(("a", "b", "c"))
    moments.add(HIDDEN, parts)
    rows = torch.cat(parts, 1).double()
    torch.testing.assert_close(moments.covariance(HIDDEN), covariance(rows), atol=1e-6, rtol=1e-6)
    assert torch.equal(moments.covariance(HIDDEN), moments.covariance(HIDDEN).T)


def test_bad_features_and_keys_are_told():
    with pytest.raises(ExpertError, match="shoes"):
        moments_of(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(SpecError, match="heads x query"):
        moments_of(*features(4)).covariance(("heads", "query"))
    with pytest.raises(SpecError, match="no rows"):
        moments_of(torch.zeros(0, 3), torch.zeros(0, 3)).covariance(HIDDEN)


def test_select_reorders_and_drops_experts():
    a, b = features(50)
    both = moments_of(a, b)
    swapped = both.select(("shoes", "clothes"))
    expected = covariance(torch.cat([b, a], 1).double())
    torch.testing.assert_close(swapped.covariance(HIDDEN), expected, atol=1e-6, rtol=1e-6)
    one = both.select(("shoes",))
    torch.testing.assert_close(one.covariance(HIDDEN), covariance(b.double()), atol=1e-6, rtol=1e-6)
    with pytest.raises(DataError, match="hats"):
        both.select(("hats",))


def test_save_and_load_are_identical(tmp_path: Path):
    moments = moments_of(*features(50, mean=10), probe="block0:output:-1")
    moments.add(("heads", "query"), features(20, seed=3), "q:output:-1")
    experts = fingerprint_experts(mlps())
    moments.fingerprint = {
        "experts": experts,
        "data": "d",
        "samples": 50,
        "seed": 0,
        "row_fraction": 0.5,
        "version": "1",
    }
    path = moments.save(tmp_path / "moments.safetensors")
    assert os.listdir(tmp_path) == ["moments.safetensors"]
    loaded = Moments.load(path, experts)
    assert (loaded.tasks, loaded.fingerprint, loaded.keys()) == (moments.tasks, moments.fingerprint, moments.keys())
    for key in (HIDDEN, ("heads", "query")):
        assert loaded.count(key) == moments.count(key) and loaded.probes(key) == moments.probes(key)
        assert torch.equal(loaded.covariance(key), moments.covariance(key))
        assert torch.equal(loaded.mean(key), moments.mean(key))
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    swapped = Moments.load(path, {task: experts[task] for task in ("shoes", "clothes")})
    assert swapped.tasks == ("shoes", "clothes")


def test_load_refuses_other_experts_and_broken_files(tmp_path: Path):
    experts = mlps()
    moments = moments_of(*features(8))
    moments.fingerprint = {"experts": fingerprint_experts(experts)}
    path = moments.save(tmp_path / "m.safetensors")
    with torch.no_grad():
        experts["shoes"].last.bias[0] += 1
    with pytest.raises(DataError, match="shoes") as told:
        Moments.load(path, fingerprint_experts(experts))
    assert "clothes" not in str(told.value)
    with pytest.raises(DataError, match="hats"):
        Moments.load(path, {"hats": "1"})
    with pytest.raises(DataError, match="no moments file"):
        Moments.load(tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not a complete moments file"):
        Moments.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moments = moments_of(*features(8))
    path = moments.save(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_module, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        moments.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.safetensors"]


def test_fingerprints_see_weights_and_buffers_and_nothing_else():
    experts = mlps()
    first = fingerprint_experts(experts)
    assert first["clothes"] != first["shoes"] and first == fingerprint_experts(mlps())
    assert fingerprint_experts({"other name": experts["clothes"]})["other name"] == first["clothes"]
    experts["clothes"].register_buffer("scratch", torch.ones(2), persistent=False)
    assert fingerprint_experts(experts) == first
    experts["clothes"].register_buffer("count", torch.tensor(3))
    assert fingerprint_experts(experts)["clothes"] != first["clothes"]
    half = fingerprint_experts({"a": mlps()["clothes"].bfloat16()})
    assert half["a"] != first["clothes"]
