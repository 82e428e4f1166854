"""How an operation is held against its oracle: every output and every gradient, by one relative error."""

import pytest
import torch


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; absolute where nothing but rounding is expected."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm if norm > 1e-12 else 1.0)


def _compare(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: _relative_error(actual[name], expected[name]) for name in expected}
    # Written so that a nan fails.
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.fixture
def relative_error():
    return _relative_error


@pytest.fixture
def compare():
    """compare(actual, expected, tolerance) holds dicts of tensors against each other."""
    return _compare
