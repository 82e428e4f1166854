"""What takes long, computed ahead in other processes and given out in order."""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fulmen.config import UserError

Key, Value = TypeVar("Key"), TypeVar("Value")


def ahead(
    compute: Callable[[Key], Value], keys: Iterable[Key], workers: int, *, together: int = 4, depth: int = 6
) -> Iterator[Value]:
    """`compute` of each key, in order; in so many other processes, a few keys ahead. 0: here, when it is asked for.

    together: how many keys a process takes at once, since values that are soon computed cost more to be handed over.
    depth: how often it does before they are asked for; of small values what a large step takes, or it waits for them.
    The processes end when the iterator is let go, unless `compute` or `keys` hold what holds it: what then comes to the
    garbage collector ends one process in five seconds. Raises what UserError `compute` raises, when it is that key's
    turn.
    """
    if not workers:
        yield from map(compute, keys)
        return
    loader = DataLoader(
        _Computed(compute),
        sampler=_groups(keys, together),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=depth,
        # A copy of this process has the sources ready; and not all of them, such as fonts, can be sent to another.
        multiprocessing_context="fork",
        # Or it would draw a seed for its workers, who need none, from the generator of the whole program.
        generator=torch.Generator(),
    )
    for pickled in loader:
        for value in pickle.loads(pickled):
            if isinstance(value, UserError):
                raise value
            yield value


def _groups(keys: Iterable[Key], size: int) -> Iterator[list[Key]]:
    """Lists of up to `size` keys."""
    keys = iter(keys)
    while group := list(islice(keys, size)):
        yield group


class _Computed(Dataset):
    def __init__(self, compute: Callable[[Any], Any]):
        self._compute = compute

    def __getitem__(self, keys: list[Any]) -> bytes:
        # torch would send each tensor through shared memory of its own, which costs more than copying an image's.
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=5).dump([self._value(key) for key in keys])
        return pickled.getvalue()

    def _value(self, key: Any) -> Any:
        # Given back and not raised: out of another process it would come with that one's traceback in its text.
        try:
            return self._compute(key)
        except UserError as error:
            return error


class _Pickler(pickle.Pickler):
    """Takes tensors for the arrays that they are, which is ten times as fast."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _as_it_is(value: Any) -> Any:
    return value
