"""Files that are replaced whole, or not at all."""

import os
import stat

import pytest

from fulmen.config import UserError
from fulmen.run.files import lock_file, write_atomic


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomic(path, "Blitz ⚡\n")
    assert path.read_bytes() == "Blitz ⚡\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    write_atomic(tmp_path / "file", "")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_refused_write_leaves_the_old_content_and_no_draft(tmp_path, monkeypatch, call):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_draft_of_a_killed_write_is_taken_over(tmp_path):
    (tmp_path / ".file.draft").write_text("half of a much longer text")
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_lock_excludes_until_closed_and_keeps_the_content(tmp_path):
    path = tmp_path / "lock"
    path.write_text("holder")
    with lock_file(path, wait=False):
        with pytest.raises(BlockingIOError):
            lock_file(path, wait=False)
        assert path.read_text() == "holder"
    lock_file(path, wait=False).close()
