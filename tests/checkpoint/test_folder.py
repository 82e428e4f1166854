import re

import pytest

from fulmen.checkpoint.folder import replaced_folder
from fulmen.config import UserError


def write(folder, text):
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    write(path, "old")
    (path / "tokenizer.json").write_text("old")
    return path


def test_a_new_folder_with_its_parents(tmp_path):
    with replaced_folder(tmp_path / "a" / "b") as draft:
        write(draft, "new")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a" / "b") == ["config.json", "model.safetensors"]
    assert names(tmp_path / "a") == ["b"]


def test_an_empty_folder_and_a_checkpoint_are_replaced(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", checkpoint):
        with replaced_folder(path) as draft:
            write(draft, "new")
        assert names(path) == ["config.json", "model.safetensors"]
        assert (path / "config.json").read_text() == "new"
    assert names(tmp_path) == ["checkpoint", "empty"]


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path, checkpoint):
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    with replaced_folder(link) as draft:
        write(draft, "new")
    assert link.is_symlink()
    assert (checkpoint / "config.json").read_text() == "new"


def fail_with(error, path):
    with replaced_folder(path) as draft:
        write(draft, "new")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_the_old_checkpoint_stays_when_writing_stops(tmp_path, checkpoint, error):
    with pytest.raises(type(error)):
        fail_with(error, checkpoint)
    assert names(checkpoint) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_checkpoint_stays_when_the_disk_is_full(tmp_path, checkpoint):
    message = f"cannot write the checkpoint {checkpoint}: No space left on device; nothing was changed"
    with pytest.raises(UserError, match=re.escape(message)):
        fail_with(OSError(28, "No space left on device"), checkpoint)
    assert names(checkpoint) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_checkpoint_comes_back_when_the_last_rename_fails(tmp_path, checkpoint, monkeypatch):
    rename = type(checkpoint).rename

    def refuse_draft(self, target):
        if self.name.endswith(".draft"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(checkpoint), "rename", refuse_draft)
    with pytest.raises(UserError, match="Input/output error"), replaced_folder(checkpoint):
        pass
    assert (checkpoint / "config.json").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_leftovers_of_a_killed_process(tmp_path, checkpoint):
    (tmp_path / ".checkpoint.draft").mkdir()
    write(tmp_path / ".checkpoint.draft", "half")
    checkpoint.rename(tmp_path / ".checkpoint.replaced")
    with pytest.raises(RuntimeError), replaced_folder(checkpoint):
        raise RuntimeError
    assert (checkpoint / "config.json").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]

    # Killed after the last rename: the replaced one is rubbish.
    (tmp_path / ".checkpoint.replaced").mkdir()
    write(tmp_path / ".checkpoint.replaced", "older")
    with replaced_folder(checkpoint) as draft:
        write(draft, "new")
    assert (checkpoint / "config.json").read_text() == "new"
    assert names(tmp_path) == ["checkpoint"]


def test_somebodys_files_are_not_deleted(tmp_path, checkpoint):
    def refused(path, message):
        before = names(tmp_path)
        with pytest.raises(UserError, match=message), replaced_folder(path):
            pytest.fail("must not get here")
        assert names(tmp_path) == before

    (checkpoint / "notes.md").write_text("mine")
    refused(checkpoint, r"checkpoint holds notes.md, which is no part of a checkpoint: choose another folder")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vocab.json").write_text("mine")
    refused(tmp_path / "data", r"data has files but no config.json")
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", r"file is a file: name a folder")
    refused(tmp_path / "file" / "under", r"cannot write the checkpoint .*Not a directory")
