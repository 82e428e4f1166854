"""Nested states, of dicts, lists, numbers and tensors, as a snapshot holds them: tensors by name, the rest as JSON."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TENSOR, ITEMS = "__tensor__", "__items__"


def split_state(state: Any, name: str = "state") -> tuple[dict[str, Tensor], Any]:
    """The tensors of a nested state by their dotted names, and the state with a reference in each one's place.

    Keys that JSON does not have, such as the integers of an optimizer's state, come back as they were; tuples as lists.
    """
    tensors: dict[str, Tensor] = {}

    def split(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            # {"a": {"b": ...}, "a.b": ...} gives one name twice.
            while name in tensors:
                name += "_"
            tensors[name] = value
            return {TENSOR: name}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {key: split(item, f"{name}.{key}") for key, item in value.items()}
            return {ITEMS: [[key, split(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [split(item, f"{name}.{index}") for index, item in enumerate(value)]
        return value

    plain = split(state, name)
    return tensors, plain


def join_state(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """What `split_state` was given."""
    if isinstance(plain, list):
        return [join_state(tensors, item) for item in plain]
    if not isinstance(plain, Mapping):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    items = plain[ITEMS] if ITEMS in plain else plain.items()
    return {key: join_state(tensors, item) for key, item in items}
