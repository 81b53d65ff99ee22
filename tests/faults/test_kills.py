"""Killed at a file event, saving leaves the old or the new, whole; the next save leaves nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

import hf_zipit
from hf_zipit.errors import ZipItError
from hf_zipit.files import recover
from hf_zipit.modeling import hub
from hf_zipit.observation.moments import Moments
from hf_zipit.running.saved import push_saved

from ..tiny import pair
from .killing import EVERYTHING, points, run, started, steps


def merged(depth: float) -> PreTrainedModel:
    return hf_zipit.merge(dict(zip("ab", pair("vit"), strict=True)), method="identity", depth=depth)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}], ids=["file", "shards"])
def test_a_killed_save_leaves_the_old_or_the_new_model(tmp_path: Path, shards: dict[str, str]) -> None:
    old, new = merged(1.0), merged(0.5)
    states = {"old": dict(old.state_dict()), "new": dict(new.state_dict())}
    wanted = {}
    for name, model in (("new", new), ("old", old)):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / "thesis.tex").write_text("years of work")
        model.save_pretrained(tmp_path / name / "out", **(shards if name == "new" else {}))
        wanted[name] = content(tmp_path / name / "out")
    found: dict[str, int] = {"old": 0, "new": 0}

    def start() -> Path:
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        return shutil.copytree(tmp_path / "old" / "out", tmp_path / "try" / "out")

    folder = start()
    count = run(lambda: new.save_pretrained(folder, **shards), tmp_path)
    assert count and content(folder) == wanted["new"]
    for point in points(count, 4):
        start()
        assert run(lambda: new.save_pretrained(folder, **shards), tmp_path, point) is None
        loaded = dict(type(new).from_pretrained(folder).state_dict())  # by transformers, which repairs nothing
        state = next((name for name, tensors in states.items() if same(tensors, loaded)), None)
        assert state, f"killed at event {point} of {count}, the folder holds neither model"
        found[state] += 1
        recover(folder)
        left = content(folder)
        other = {name for name in {*left, *wanted["new"]} if left.get(name) != wanted["new"].get(name)}
        assert left in wanted.values(), f"killed at event {point}, {sorted(other)} are neither old nor new"
        assert not (folder / ".hf_zipit").exists()
    assert found["old"] and found["new"]
    print(f"killed at {sum(found.values())} of {count} file events: {found}")


def test_two_writers_never_mix(tmp_path: Path) -> None:
    """Between any two file events of two processes that save in turns, one of the models is there, whole.

    Every configuration that is seen is loaded once, by transformers, which repairs nothing.
    """
    models, folder = (merged(1.0), merged(0.5)), tmp_path / "out"

    def seen() -> tuple[dict[str, Any], bytes]:
        config = json.loads((folder / "config.json").read_text())
        return config, (folder / config.pop("transformers_weights", "model.safetensors")).read_bytes()

    whole = []
    for model in models[::-1]:
        model.save_pretrained(folder)
        whole.insert(0, seen())
    writers = {number: steps(partial(models[number].save_pretrained, folder), tmp_path) for number in (1, 0)}
    found, loaded = [], set()
    while writers:
        for number, writer in list(writers.items()):
            if next(writer, "done") == "done":
                del writers[number]
            assert (look := seen()) in whole, "a look finds neither model"
            found.append(whole.index(look))
            if (config := (folder / "config.json").read_bytes()) not in loaded:
                state = dict(type(models[0]).from_pretrained(folder).state_dict())
                assert same(state, dict(models[found[-1]].state_dict()))
                loaded.add(config)
    assert [number for number, _ in groupby(found)] == [0, 1, 0]
    assert len(loaded) == 4  # each pointing to its weights where they were written, and in their place
    assert not (folder / ".hf_zipit").exists()


@pytest.mark.skipif(not EVERYTHING, reason="takes minutes; the test above goes through the same states one by one")
def test_looks_while_two_writers_never_rest(tmp_path: Path) -> None:
    """Whoever looks while two processes save again and again finds one of the models, whole.

    A look counts if `config.json` is the same file before and after: transformers opens it and the weights in turn.
    """
    models, folder = (merged(1.0), merged(0.5)), tmp_path / "out"
    states = [dict(model.state_dict()) for model in models]
    models[0].save_pretrained(folder)

    def write(model: PreTrainedModel) -> None:
        while True:
            model.save_pretrained(folder)

    def seen() -> tuple[int, int]:
        found = (folder / "config.json").stat()
        return found.st_ino, found.st_mtime_ns

    writers = [started(lambda model=model: write(model)) for model in models]
    counts, wanted, deadline = [0, 0], 3000, time.monotonic() + 3000
    try:
        while sum(counts) < wanted and time.monotonic() < deadline:
            before, loaded = seen(), None
            try:
                loaded = dict(type(models[0]).from_pretrained(folder).state_dict())
            except (OSError, ZipItError, RuntimeError, ValueError, SafetensorError):
                assert seen() != before, "what does not load stays"
            if seen() == before:
                matching = [same(state, loaded) for state in states]
                assert any(matching), "a look finds neither model"
                counts[matching.index(True)] += 1
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    print(f"{sum(counts)} looks while two processes saved: {counts}")
    assert sum(counts) == wanted and all(counts)


def test_a_killed_push_leaves_the_folder_and_the_repo_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit of the Hub is whole or nothing; all that is written beside it lies in a folder of its own."""
    repo, model = tmp_path / "repo", merged(1.0)
    model.save_pretrained(tmp_path / "out")
    before = content(tmp_path / "out")
    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id),
        list_repo_files=lambda *_, **__: [],
        create_commit=lambda _, changes, **__: repo.write_text(str(len(changes))),
    )
    monkeypatch.setattr(hub, "_api", lambda token: api)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for push in (lambda: push_saved(tmp_path / "out", "me/x"), lambda: model.push_to_hub("me/x")):
        count = run(push, tmp_path)
        committed, found = repo.read_text(), [0, 0]
        assert count and committed
        for point in points(count, 2):
            repo.unlink(missing_ok=True)
            assert run(push, tmp_path, point) is None
            assert content(tmp_path / "out") == before
            found[repo.exists()] += 1
            assert not repo.exists() or repo.read_text() == committed
        assert found[0]
        print(f"killed at {sum(found)} of {count} file events: {found[0]} without a commit, {found[1]} after it")


def test_a_killed_save_of_moments_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    def moments(rows: int) -> Moments:
        made = Moments(("a", "b"), fingerprint={"experts": {"a": "1", "b": "2"}})
        made.add(("space",), [torch.randn(rows, 3), torch.randn(rows, 3)])
        return made

    old, new, path = moments(5), moments(9), tmp_path / "moments.safetensors"
    count = run(lambda: new.save(path), tmp_path)
    assert count
    for point in points(count, 4):
        old.save(path)
        run(lambda: new.save(path), tmp_path, point)
        assert Moments.load(path).count(("space",)) in (5, 9)
        new.save(path)
        assert [each.name for each in tmp_path.iterdir()] == ["moments.safetensors"]
    print(f"killed at file events of a file of moments, of {count}")
