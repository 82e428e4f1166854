"""Snapshots: exact when intact, recognised when damaged, and never lost to a crash or a full disk."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fulmen.config import UserError
from fulmen.run import snapshot as module
from fulmen.run.snapshot import Snapshot, SnapshotError, SnapshotStore

CRASHES = Path(__file__).with_name("crashes.py")


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "snapshots")


def fill(store, *steps):
    for step in steps:
        store.save(step, {"w": torch.full((3,), step)}, {"step": step})


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert bits(actual[name]) == bits(tensor), name


def test_tensors_come_back_bit_for_bit(store):
    base = torch.randn(6, 8)
    tensors = {
        "contiguous": base,
        "shared": base,
        "view of shared": base[2:4],
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.randn(1, 5).expand(4, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "special": torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "rng": torch.get_rng_state(),
        "odd bytes": torch.arange(13, dtype=torch.uint8),
        'quote " ⚡ name': torch.tensor([2**62 + 1]),
    }
    for dtype in module._DTYPE_NAMES:
        tensors[str(dtype)] = torch.arange(6).reshape(2, 3).to(dtype)
    store.save(1, tensors, {})
    assert_same_tensors(store.latest().tensors(), tensors)


def test_loaded_tensors_are_the_callers_own(store):
    path = store.save(1, {"w": torch.zeros(3)}, {})
    before = (path / "tensors.safetensors").read_bytes()
    store.load().tensors()["w"].add_(1)
    assert (path / "tensors.safetensors").read_bytes() == before


def test_tensors_file_is_one_that_safetensors_reads_aligned(store):
    path = store.save(1, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.tensor(1.0)}, {})
    data = (path / "tensors.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % 4 == 0 for name in "bc")
    with safe_open(path / "tensors.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a", "b", "c"]
        assert file.metadata() == {"format": "pt"}


def test_state_comes_back(store):
    state = {"position": [3, 2**70], "best": math.inf, "rate": 0.1, "name": "⚡", "nested": {"a": None, "b": True}}
    store.save(1, {}, state)
    assert store.latest().state == state


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()])
def test_tensor_that_cannot_be_kept_is_a_programmers_error(store, tensor):
    with pytest.raises(TypeError, match="a snapshot cannot hold odd"):
        store.save(1, {"odd": tensor}, {})
    with pytest.raises(TypeError):
        store.save(1, {}, {"odd": object()})
    assert store.latest() is None


def test_newest_are_kept(tmp_path):
    store = SnapshotStore(tmp_path, keep=2)
    assert store.latest() is None
    assert store.steps() == []
    fill(store, 1, 2, 30)
    assert store.steps() == [2, 30]
    assert store.latest() == Snapshot(step=30, path=tmp_path / "step-00000030", state={"step": 30})
    assert store.load(2).state == {"step": 2}
    assert store.load().step == 30
    with pytest.raises(UserError, match="at least 1 snapshot, not 0"):
        SnapshotStore(tmp_path, keep=0)


def test_missing_snapshots_are_named(store):
    with pytest.raises(SnapshotError, match=r"no snapshot in .*snapshots; there are: none"):
        store.load()
    fill(store, 1, 2)
    with pytest.raises(SnapshotError, match=r"no snapshot of step 7 in .*snapshots; there are: 1, 2"):
        store.load(7)


def test_going_back_drops_the_way_not_taken(tmp_path):
    store = SnapshotStore(tmp_path, keep=3)
    fill(store, 10, 20, 30)
    store.load(10)
    assert store.steps() == [10, 20, 30], "reading deletes nothing"
    fill(store, 15)
    assert store.steps() == [10, 15]


def test_same_step_is_replaced(store):
    fill(store, 1, 2)
    store.save(2, {"w": torch.zeros(1)}, {"again": True})
    assert store.latest().state == {"again": True}
    assert store.steps() == [1, 2]
    assert_same_tensors(store.latest().tensors(), {"w": torch.zeros(1)})


FILES = ["tensors.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "longer", "deleted"])
def test_damaged_snapshot_is_passed_over(store, name, damage):
    fill(store, 1, 2)
    path = store.folder / "step-00000002" / name
    data = path.read_bytes()
    middle = len(data) // 2
    damaged = {
        "truncated": data[:middle],
        "emptied": b"",
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "longer": data + b"}",
    }
    path.unlink() if damage == "deleted" else path.write_bytes(damaged[damage])
    assert store.latest().step == 1
    (warning,) = store.warnings
    assert f"the snapshot {path.parent} is damaged: " in warning
    assert name in warning or "flipped" in damage
    with pytest.raises(SnapshotError, match="is damaged"):
        store.load(2)


def test_every_flipped_bit_of_a_manifest_is_noticed_or_harmless(store):
    fill(store, 1)
    path = store.folder / "step-00000001" / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            assert store.load(1).state == {"step": 1}
        except SnapshotError as error:
            assert "is damaged" in str(error)  # noqa: PT017 - both outcomes are right


def test_snapshot_in_the_folder_of_another_step_is_damaged(store):
    fill(store, 1)
    os.rename(store.folder / "step-00000001", store.folder / "step-00000005")
    with pytest.raises(SnapshotError, match=r"manifest\.json is of another step"):
        store.load(5)


def test_nothing_intact_is_an_error_that_shows_the_way_out(store):
    fill(store, 1, 2)
    for path in store.folder.rglob("state.json"):
        path.write_text("{}")
    with pytest.raises(SnapshotError, match=r"step-00000002 is damaged.*step-00000001 is damaged.*to begin again"):
        store.latest()
    fill(store, 3)
    assert store.latest().step == 3
    assert store.warnings == []


def test_leftovers_of_a_killed_save_are_removed_and_a_replaced_snapshot_comes_back(store):
    fill(store, 1, 2)
    before = listing(store.folder)
    (store.folder / ".draft-3").mkdir()
    (store.folder / ".draft-3" / "tensors.safetensors").write_bytes(b"half")
    (store.folder / ".pruned-0").mkdir()
    os.rename(store.folder / "step-00000002", store.folder / ".replaced-2")
    assert SnapshotStore(store.folder).latest().step == 2
    assert listing(store.folder) == before


def test_a_reader_leaves_the_draft_of_a_save_in_progress_alone(store):
    fill(store, 1)
    with store.writing(2, {}, 0) as draft:
        (draft / "tensors.safetensors").write_bytes(b"")
        assert SnapshotStore(store.folder).latest().step == 1
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("failing", range(7))
def test_refusal_at_any_moment_of_a_save_changes_nothing(store, monkeypatch, code, failing):
    fill(store, 1, 2)
    before = listing(store.folder)
    calls = iter(range(100))

    def refuse_one(real):
        def call(*arguments, **options):
            if next(calls) == failing:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", refuse_one(os.fsync))
    monkeypatch.setattr(Path, "rename", refuse_one(Path.rename))
    # The seventh call and last before the pruning makes the new name durable: the snapshot is then already whole.
    with pytest.raises(SnapshotError) as error:
        store.save(2, {"w": torch.ones(100)}, {})
    message = str(error.value)
    assert f"cannot save the snapshot of step 2 in {store.folder}: {os.strerror(code)} (" in message
    assert f" free); {store.folder / 'step-00000002'} is intact" in message
    assert "\n" not in message
    if failing < 6:
        assert listing(store.folder) == before
    assert store.steps() == [1, 2]
    assert store.latest().step == 2
    assert store.warnings == []
    assert not list(store.folder.glob(".*-*"))


def test_refused_save_on_the_way_back_keeps_later_snapshots(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, keep=3)
    fill(store, 10, 20, 30)

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SnapshotError):
        fill(store, 15)
    assert store.steps() == [10, 20, 30]


def test_interrupted_save_changes_nothing(store, monkeypatch):
    fill(store, 1)
    before = listing(store.folder)

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(store, 2)
    assert listing(store.folder) == before


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match=r"Not a directory .*there is no earlier one that is intact"):
        SnapshotStore(tmp_path / "file" / "snapshots").save(1, {}, {})


@pytest.mark.parametrize("scene", ["full_disk", "kill_at_every_call", "kill_at_random_moments"])
def test_in_processes_that_die(tmp_path, scene):
    done = subprocess.run([sys.executable, CRASHES, scene, tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
