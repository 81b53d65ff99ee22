"""Results are replaced whole or not at all."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path

import pytest

from hf_zipit.errors import OutputError
from hf_zipit.files import adding_to, check_result_folder, check_writable, recover, replacing, write_json
from hf_zipit.files.known import MANIFEST


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = write_json(tmp_path / "results.json", {"accuracy": 0.5})
    with pytest.raises(OutputError, match="No space left"), replacing(target) as beside:
        beside.write_text("half a res")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert json.loads(target.read_text()) == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_failure_of_the_work_itself_is_passed_on_as_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


MERGED = '{"model_type": "zipit"}'


def save(folder: Path, files: dict[str, str]) -> None:
    with adding_to(folder) as beside:
        for name, text in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """What a folder holds, but for our manifest."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_a_model_replaces_what_we_wrote_and_nothing_else(tmp_path):
    folder = tmp_path / "deep" / "model"
    mine = {
        "thesis.tex": "years",
        "data/x.csv": "1",
        "checkpoint-500/model.safetensors": "kept",
        "picture.png": "mine",
    }
    save(folder, {"config.json": MERGED, "model-00001-of-00002.safetensors": "1", "processors/a/vocab.txt": "1"})
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "config.json").chmod(0o640)
    save(folder, new := {"config.json": MERGED + " ", "model.safetensors": "2"})
    assert content(folder) == {**new, **mine}
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o640
    assert not (folder / "processors").exists()


def test_a_failed_save_leaves_the_old_model(tmp_path):
    save(tmp_path, old := {"config.json": MERGED, "model.safetensors": "good"})
    with pytest.raises(OutputError), adding_to(tmp_path) as beside:
        (beside / "config.json").write_text("bad")
        raise OSError(errno.EIO, "Input/output error")
    assert content(tmp_path) == old


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    save(tmp_path / "out", files := {"config.json": MERGED})
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "disk") == files


def test_links_in_a_folder_are_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "secret" / "key")
    save(folder, {"config.json": MERGED, "README.md": "card"})
    assert not (folder / "README.md").is_symlink()
    (folder / "processors").symlink_to(tmp_path / "secret")
    with pytest.raises(OutputError, match="behind a link"):
        save(folder, {"config.json": MERGED, "processors/a/vocab.txt": "x"})
    assert content(tmp_path / "secret") == {"key": "secret"}


@pytest.mark.parametrize("name", ["../../victim", "/VICTIM", "inner/key"])
def test_a_journal_of_somebody_else_does_not_lead_out_of_its_folder(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("safe")
    folder = tmp_path / "a" / "b"
    (folder / ".hf_zipit" / "new").mkdir(parents=True)
    (folder / ".hf_zipit" / "new" / "inner").symlink_to(tmp_path)
    name = name.replace("/VICTIM", str(victim)).replace("key", "victim")
    (folder / ".hf_zipit" / "journal.json").write_text(json.dumps({"files": [name], "stale": [name]}))
    recover(folder)
    assert victim.read_text() == "safe" and list(folder.iterdir()) == []


def test_a_model_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for write in (lambda: save(tmp_path, {"config.json": MERGED}), lambda: check_result_folder(tmp_path)):
        with pytest.raises(OutputError, match="a model of type 'vit' that hf_zipit did not write"):
            write()
    assert content(tmp_path) == {"config.json": '{"model_type": "vit"}'}


def test_a_model_of_ours_that_somebody_changed_is_not_replaced(tmp_path):
    save(tmp_path, {"config.json": '{"model_type": "vit"}'})  # as the experts that a recipe trains
    save(tmp_path, {"config.json": '{"model_type": "bert"}'})
    (tmp_path / "config.json").write_text('{"model_type": "vit", "trained": true}')
    with pytest.raises(OutputError, match="did not write"):
        save(tmp_path, {"config.json": MERGED})


def test_an_input_is_no_place_for_a_result(tmp_path):
    save(tmp_path / "experts" / "a", {"config.json": MERGED})
    (tmp_path / "same").symlink_to(tmp_path / "experts")
    for out in ("experts/a", "experts", ".", "same", "same/a/../a"):
        with pytest.raises(OutputError, match="is to be read"):
            check_result_folder(tmp_path / out, [tmp_path / "experts" / "a"])
    check_result_folder(tmp_path / "experts" / "b", [tmp_path / "experts" / "a", "not/local"])


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a saved model"):
        check_result_folder(tmp_path)


def test_asking_whether_a_folder_can_be_written_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_path_through_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(tmp_path / "file" / "results.json", {})


def test_a_place_where_no_file_can_be_made_is_told(tmp_path, monkeypatch):
    def refuse(dir: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", f"{dir}/tmp")  # as of /proc

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tmp_path / "a" / "b")
