"""How a launch is cut, without a GPU."""

import types

import pytest
import torch


@pytest.mark.parametrize(
    ("heads", "samples", "name"),
    [(64, 1, "wide"), (32, 1, "narrow"), (16, 1, "wide"), (8, 1, "wide"), (32, 2, "wide"), (8, 4, "narrow")],
)
def test_default_tiling_of_an_h100(gpu_device, heads, samples, name):
    from fulmen.ops.lightning.tiling import candidates, default_tiling

    tiling = default_tiling(torch.bfloat16, 128, 128, heads * samples, processors=132)
    assert tiling == candidates(torch.bfloat16, 128, 128)[name]


@pytest.mark.parametrize(("dtype", "key_dim", "value_dim"), [(torch.float32, 64, 64), (torch.float16, 32, 256)])
def test_no_choice_of_tilings(gpu_device, dtype, key_dim, value_dim):
    from fulmen.ops.lightning.tiling import candidates, default_tiling

    (only,) = candidates(dtype, key_dim, value_dim).values()
    assert {default_tiling(dtype, key_dim, value_dim, walks, processors=132) for walks in (1, 32, 1000)} == {only}


@pytest.mark.parametrize(
    ("is_cuda", "size", "is_compiling", "worth"),
    [
        (True, 2**16, False, True),
        (False, 2**16, False, False),
        (True, 2**16 - 1, False, False),
        (True, 2**16, True, False),
    ],
)
def test_when_tilings_are_timed(gpu_device, monkeypatch, is_cuda, size, is_compiling, worth):
    from fulmen.ops.lightning.tiling import is_worth_a_trial

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    assert is_worth_a_trial(types.SimpleNamespace(is_cuda=is_cuda), size) == worth


def test_questions_are_few(gpu_device):
    from fulmen.ops.lightning.tiling import _rounded

    assert [_rounded(n, 64) for n in (1, 2, 3, 63, 64, 65, 10**6)] == [1, 2, 2, 32, 64, 64, 64]
