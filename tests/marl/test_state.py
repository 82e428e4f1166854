"""Nested states survive the split into tensors and JSON."""

import json

import torch

from fulmen.marl.state import join_state, split_state


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


def test_comes_back_as_it_was():
    state = {
        "frames": 3,
        "inf": float("inf"),
        "nothing": None,
        "empty": {},
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.99)}]},
        "flags": torch.tensor([True, False]),
        "list": [torch.arange(3), 1, "a"],
    }
    tensors, plain = split_state(state)
    assert set(tensors) == {"state.optimizer.state.0.step", "state.flags", "state.list.0"}
    assert same(join_state(tensors, json.loads(json.dumps(plain))), state)


def test_names_that_coincide_are_kept_apart():
    state = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 2: torch.ones(2), "2": torch.zeros(2)}
    tensors, plain = split_state(state)
    assert len(tensors) == 4
    assert same(join_state(tensors, json.loads(json.dumps(plain))), state)
