"""Results are replaced whole or not at all."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path

import pytest

from hf_zipit.errors import OutputError
from hf_zipit.files import check_result_folder, check_writable, replacing, replacing_folder, write_json


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


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    for content in ({"config.json": "1", "old": "1"}, {"config.json": "2"}):
        with replacing_folder(target) as beside:
            for name, text in content.items():
                (beside / name).write_text(text)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "2"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("good")
    with pytest.raises(OutputError), replacing_folder(tmp_path / "model") as beside:
        (beside / "config.json").write_text("bad")
        raise OSError(errno.EIO, "Input/output error")
    assert (tmp_path / "model" / "config.json").read_text() == "good"


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
