"""What takes long, computed ahead in other processes and given out in order."""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fulmen.config import UserError

Key, Value = TypeVar("Key"), TypeVar("Value")


def ahead(compute: Callable[[Key], Value], keys: Iterable[Key], workers: int) -> Iterator[Value]:
    """`compute` of each key, in order; in so many other processes, a few keys ahead. 0: here, when it is asked for.

    Raises what UserError `compute` raises, when it is that key's turn.
    """
    if not workers:
        yield from map(compute, keys)
        return
    loader = DataLoader(
        _Computed(compute),
        sampler=keys,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        # A copy of this process has the sources ready; and not all of them, such as fonts, can be sent to another.
        multiprocessing_context="fork",
        # Or it would draw a seed for its workers, who need none, from the generator of the whole program.
        generator=torch.Generator(),
    )
    for pickled in loader:
        value = pickle.loads(pickled)
        if isinstance(value, UserError):
            raise value
        yield value


class _Computed(Dataset):
    def __init__(self, compute: Callable[[Any], Any]):
        self._compute = compute

    def __getitem__(self, key: Any) -> bytes:
        # Given back and not raised: out of another process it would come with that one's traceback in its text.
        try:
            value = self._compute(key)
        except UserError as error:
            value = error
        # torch would send each tensor through shared memory of its own, which costs more than copying an image's.
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=5).dump(value)
        return pickled.getvalue()


class _Pickler(pickle.Pickler):
    """Takes tensors for the arrays that they are, which is ten times as fast."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _as_it_is(value: Any) -> Any:
    return value
