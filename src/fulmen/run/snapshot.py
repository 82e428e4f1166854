"""Snapshots that a run resumes from: tensors in safetensors, the rest in JSON, whole or not there at all.

    snapshots/step-00000200/tensors.safetensors    or, of a run over several ranks, a folder `tensors` (fulmen.parallel)
                            state.json
                            manifest.json          sizes and BLAKE2b checksums of all files
    snapshots/.draft-200                           being written; becomes step-00000200 by one rename
    snapshots/.replaced-200                        the former step-00000200, until the new one has its name
    snapshots/.pruned-100                          being deleted

A process that dies at any moment leaves at most hidden folders, which the next store to open cleans up.
"""

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fulmen.config import UserError
from fulmen.run.files import lock_file, sync, sync_folder

TENSORS, SHARDS, STATE, MANIFEST = "tensors.safetensors", "tensors", "state.json", "manifest.json"

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SnapshotError(UserError):
    """A snapshot could not be written or read; the message says which one is good."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run was at the end of `step`, found intact: its folder `path`, its JSON `state` and its tensors."""

    step: int
    path: Path
    state: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, on the CPU, with the shapes, dtypes and bits that they were saved with."""
        return load_file(self.path / TENSORS) if self.shards is None else _read_shards(self.shards)

    @property
    def shards(self) -> Path | None:
        """The folder of a distributed checkpoint, if that is what the tensors are in."""
        folder = self.path / SHARDS
        return folder if folder.is_dir() else None


class SnapshotStore:
    """The snapshots of one run in `folder`, of which the newest `keep` are kept.

    One process writes; others may read at the same time. `warnings` holds one line for each damaged snapshot that the
    last `latest()` passed over.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"a run keeps at least 1 snapshot, not {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.warnings: list[str] = []
        # Whoever holds the lock is saving, and its hidden folders are no leftovers.
        if any(self.folder.glob(".*-*")):
            with contextlib.suppress(OSError), self._locked(wait=False):
                self._clean_up()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the snapshot of `step`, then delete those that it makes superfluous; return its folder.

        `tensors` may be strided anyhow, share memory and lie on any device: each is copied to the CPU, and made
        contiguous if need be, one at a time. What shares memory is stored once for each name. `state` is what JSON
        holds, so that tuples come back as lists; non-finite floats are exact.

        Superfluous are all but the newest `keep` and, because a run that went back to an earlier step has taken another
        way, all of later steps. Raises `SnapshotError` if the disk refuses; all earlier snapshots are then untouched.
        """
        header = _safetensors_header(tensors)
        with self.writing(step, state, len(header) + sum(tensor.nbytes for tensor in tensors.values())) as draft:
            _write_file(draft / TENSORS, _safetensors(header, tensors))
        return self._path(step)

    @contextlib.contextmanager
    def writing(self, step: int, state: Mapping[str, Any], needed: int) -> Iterator[Path]:
        """Give a new folder, which is the snapshot of `step` once the block has ended with its tensors in there.

        As for `save`, which see for the rest. needed: bytes of the tensors, for the message if the disk refuses.
        """
        state_json = json.dumps(state).encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(wait=True):
                self._clean_up()
                try:
                    draft = self.draft(step)
                    draft.mkdir()
                    yield draft
                    _write_file(draft / STATE, [state_json])
                    self._publish(step)
                except BaseException:
                    self._clean_up()
                    raise
                self._prune(step)
        except OSError as error:
            raise self._save_error(step, needed + len(state_json), error) from error

    def draft(self, step: int) -> Path:
        """Where the snapshot of `step` lies while it is being written."""
        return self.folder / f".draft-{step}"

    def latest(self) -> Snapshot | None:
        """Return the newest intact snapshot, None if there is none at all; `warnings` tells of damaged newer ones.

        Raises `SnapshotError` if there are snapshots and all are damaged: to begin again is for the user to decide.
        """
        self.warnings = []
        for step in reversed(self.steps()):
            try:
                return self._open(step)
            except SnapshotError as error:
                self.warnings.append(str(error))
        if self.warnings:
            raise SnapshotError(f"{'; '.join(self.warnings)}; none is left: delete {self.folder} to begin again")
        return None

    def load(self, step: int | None = None) -> Snapshot:
        """Return the snapshot of `step`, by default the newest intact one; `SnapshotError` if it is not there."""
        if step in self.steps():
            return self._open(step)
        snapshot = self.latest() if step is None else None
        if snapshot is None:
            wanted = "snapshot" if step is None else f"snapshot of step {step}"
            there = ", ".join(map(str, self.steps())) or "none"
            raise SnapshotError(f"no {wanted} in {self.folder}; there are: {there}")
        return snapshot

    def steps(self) -> list[int]:
        """Return the steps of all snapshots, intact or not, in ascending order."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    @contextlib.contextmanager
    def _locked(self, *, wait: bool) -> Iterator[None]:
        with lock_file(self.folder / ".lock", wait=wait):
            yield

    def _publish(self, step: int) -> None:
        """Let the draft become the snapshot, with its manifest."""
        draft, final = self.draft(step), self._path(step)
        files = {path.relative_to(draft).as_posix(): _measure(path) for path in draft.rglob("*") if path.is_file()}
        _write_file(draft / MANIFEST, [json.dumps({"step": step, "files": files}, indent=2).encode()])
        for folder in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
            sync_folder(folder)
        # A folder cannot be renamed onto one that holds files.
        if final.exists():
            final.rename(self.folder / f".replaced-{step}")
        draft.rename(final)
        sync_folder(self.folder)

    def _prune(self, step: int) -> None:
        steps = self.steps()
        kept = [other for other in steps if other <= step][-self.keep :]
        for other in set(steps) - set(kept):
            self._path(other).rename(self.folder / f".pruned-{other}")
        self._clean_up()

    def _clean_up(self) -> None:
        """Undo or finish what a save left undone; only under the lock."""
        for path in self.folder.glob(".*-*"):
            kind, _, step = path.name.partition("-")
            if kind == ".replaced" and not self._path(int(step)).exists():
                path.rename(self._path(int(step)))
            elif kind in (".draft", ".replaced", ".pruned"):
                shutil.rmtree(path, ignore_errors=True)

    def _open(self, step: int) -> Snapshot:
        path = self._path(step)
        if damage := _find_damage(path, step):
            raise SnapshotError(f"the snapshot {path} is damaged: {damage}")
        return Snapshot(step=step, path=path, state=json.loads((path / STATE).read_bytes()))

    def _save_error(self, step: int, needed: int, error: OSError) -> SnapshotError:
        place = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        try:
            good = self.latest()
        except SnapshotError:
            good = None
        return SnapshotError(
            f"cannot save the snapshot of step {step} in {self.folder}: {error.strerror or error} "
            f"({needed:,} bytes needed, {free:,} free); "
            + (f"{good.path} is intact" if good else "there is no earlier one that is intact")
        )


def _safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the length and the JSON table that open a safetensors file of `tensors`."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in _in_file_order(tensors):
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided:
            raise TypeError(f"a snapshot cannot hold {name}: {tensor.dtype}, {tensor.layout}")
        end = offset + tensor.nbytes
        table[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8, so that they can be mapped into memory.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _safetensors(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece, so that saving needs memory for one tensor's copy at most."""
    yield header
    for _, tensor in _in_file_order(tensors):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())


def _in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    # Wide elements first: every tensor then begins at a multiple of its element's size.
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a durable file."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        sync(file)


def _measure(path: Path) -> dict[str, Any]:
    """A file's fingerprint."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a distributed checkpoint whole, on the CPU."""
    # Imported only here, because it takes a second, and few runs have such snapshots.
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of reading in a single process, which is the intent
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _find_damage(path: Path, step: int) -> str | None:
    """Return what is wrong with a snapshot's files, None if they are what was saved."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["step"] != step:
            return f"{MANIFEST} is of another step"
        if STATE not in manifest["files"] or len(manifest["files"]) < 2:
            return f"{MANIFEST} names too few files"
        for name, expected in manifest["files"].items():
            found = _measure(path / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']:,} bytes of {expected['bytes']:,}"
            if found["blake2b"] != expected["blake2b"]:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is unreadable"
    return None
