"""Snapshots of which every rank writes its part, in the background; a run may go on from them over other ranks.

They lie in the store of `fulmen.run` like those of one process, the tensors as PyTorch's distributed checkpoint.
"""

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fulmen.run.snapshot import SHARDS, Snapshot, SnapshotStore


class WholeSnapshots:
    """The same of one process, which writes all of it at once."""

    def __init__(self, store: SnapshotStore):
        self._store = store

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """As of `SnapshotStore`."""
        self._store.save(step, tensors, state)

    def settle(self) -> None:
        """Nothing is being written."""

    def restore(self, snapshot: Snapshot, tensors: dict[str, Tensor]) -> None:
        """Fill tensors with those of the same names in a snapshot of any ranks; what it lacks stays as it is."""
        _copy(snapshot.tensors(), tensors)


class ShardedSnapshots:
    """Saves into a store; every rank calls each method at the same time.

    The tensors are copied when `save` is called and written while training goes on. A snapshot is there, whole, once
    the next one is begun or `settle` has been called.
    """

    def __init__(self, store: SnapshotStore):
        self._store = store
        # Of its own, since it is used at the same time as the training's.
        self._group = dist.new_group(backend="gloo")
        self._writing: tuple[Future, ExitStack] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write the snapshot of a step. Raises SnapshotError on the first rank if the disk refuses."""
        self.settle()
        stack = ExitStack()
        if dist.get_rank() == 0:
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            stack.enter_context(self._store.writing(step, state, needed))
        dist.barrier(self._group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own pickling
            future = dcp.async_save(
                dict(tensors), checkpoint_id=self._store.draft(step) / SHARDS, process_group=self._group
            )
        self._writing = future, stack

    def settle(self) -> None:
        """Wait until what is being written is there."""
        if self._writing is not None:
            (future, stack), self._writing = self._writing, None
            with stack:
                future.result()
            dist.barrier(self._group)

    def restore(self, snapshot: Snapshot, tensors: dict[str, Tensor]) -> None:
        """The same, of tensors that may be sharded."""
        if snapshot.shards is None:
            _copy(snapshot.tensors(), tensors)
            return
        reader = dcp.FileSystemReader(snapshot.shards)
        there = reader.read_metadata().state_dict_metadata
        found = {name: tensor for name, tensor in tensors.items() if name in there}
        dcp.load(found, storage_reader=reader, process_group=self._group)


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, live in tensors.items():
        if name in saved:
            # Experts' matrices have the dims of their cuts where they are spread.
            whole = saved[name].to(live.device).reshape(live.shape)
            if isinstance(live, DTensor):
                whole = distribute_tensor(whole, live.device_mesh, live.placements)
            live.copy_(whole)
