"""Every input that `lightning_attention` refuses, and the line that it says."""

import warnings

import pytest
import torch

from fulmen.ops import gpu
from fulmen.ops.lightning import _report, lightning_attention


def call(*, q=(1, 6, 2, 4), k=(1, 6, 2, 4), v=(1, 6, 2, 5), rates=(2,), dtypes=(torch.float32,) * 3, **options):
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip((q, k, v), dtypes, strict=True)]
    return lightning_attention(*tensors, torch.ones(rates), **options)


def borders(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": (6, 2, 4), "k": (6, 2, 4)}, r"q, k \[B, T, H, K\] and v \[B, T, H, V\], got \(6, 2, 4\)"),
        ({"k": (1, 6, 2, 3)}, r"got \(1, 6, 2, 4\), \(1, 6, 2, 3\)"),
        ({"v": (6, 2, 5)}, r"got .*\(6, 2, 5\)"),
        ({"v": (1, 5, 2, 5)}, r"got .*\(1, 5, 2, 5\)"),
        (
            {"q": (1, 0, 2, 4), "k": (1, 0, 2, 4), "v": (1, 0, 2, 5)},
            r"at least one sequence of one token, got q \(1",
        ),
        (
            {"q": (0, 6, 2, 4), "k": (0, 6, 2, 4), "v": (0, 6, 2, 5)},
            r"at least one sequence of one token, got q \(0",
        ),
        ({"dtypes": (FP32, FP32, BF16)}, r"one floating dtype, got torch.float32, torch.float32, torch.bfloat16"),
        ({"dtypes": (FP32, BF16, FP32)}, r"one floating dtype"),
        ({"dtypes": (torch.int64,) * 3}, r"one floating dtype, got torch.int64"),
        ({"rates": (3,)}, r"rates must be \[H\] = \[2\], got \(3,\)"),
        ({"rates": (1, 2)}, r"rates must be \[H\] = \[2\], got \(1, 2\)"),
        ({"state": torch.zeros(1, 2, 5, 4)}, r"state must be \(1, 2, 4, 5\) torch.float32, got \(1, 2, 5, 4\)"),
        ({"state": torch.zeros(1, 2, 4, 5, dtype=BF16)}, r"state must be .* torch.float32, got .* torch.bfloat16"),
        ({"state": torch.zeros(1, 2, 4, 5), "dtypes": (FP64,) * 3}, r"state must be .* torch.float64"),
        ({"state": torch.zeros(1, 2, 4, 5), "cu_seqlens": borders(0, 2, 6)}, r"state must be \(2, 2, 4, 5\)"),
        (
            {"q": (2, 6, 2, 4), "k": (2, 6, 2, 4), "v": (2, 6, 2, 5), "cu_seqlens": borders(0, 6)},
            r"need B == 1, got B == 2",
        ),
        (
            {"cu_seqlens": borders(0, 6, dtype=torch.int64)},
            r"must be \[N\+1\] int32, got \(2,\) torch.int64",
        ),
        ({"cu_seqlens": borders([0, 6])}, r"cu_seqlens must be \[N\+1\] int32, got \(1, 2\)"),
        ({"cu_seqlens": borders(0)}, r"cu_seqlens must be \[N\+1\] int32, got \(1,\)"),
        ({"cu_seqlens": borders(1, 6)}, r"rise strictly from 0 to T == 6, got \[1, 6\]"),
        ({"cu_seqlens": borders(0, 5)}, r"rise strictly from 0 to T == 6, got \[0, 5\]"),
        ({"cu_seqlens": borders(0, 3, 3, 6)}, r"rise strictly from 0 to T == 6, got \[0, 3, 3, 6\]"),
        ({"cu_seqlens": borders(0, 4, 2, 6)}, r"rise strictly"),
        ({"backend": "fast"}, r"backend must be one of naive, chunked.* or None, got 'fast'"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize("which", ["k", "v", "rates", "state"])
def test_tensors_on_different_devices(which):
    tensors = {name: torch.zeros(1, 6, 2, 4) for name in ("q", "k", "v")}
    tensors |= {"rates": torch.ones(2), "state": torch.zeros(1, 2, 4, 4)}
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(ValueError, match=r"on q's device cpu, got .*meta"):
        lightning_attention(**tensors)


@pytest.mark.parametrize("backend", [None, "naive", "chunked"])
def test_accepted(backend):
    out, state = call(backend=backend, cu_seqlens=borders(0, 2, 6), state=torch.zeros(2, 2, 4, 5), return_state=True)
    assert out.shape == (1, 6, 2, 5)
    assert state.shape == (2, 2, 4, 5)


def test_without_triton_its_backend_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r'backend "triton" needs the triton package; install it, or take .*chunked'):
        call(backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("width", "has_triton", "reason"), [(100, True, "got 100"), (64, False, "triton package")])
def test_a_gpu_without_its_kernel_says_so_once(width, has_triton, reason, monkeypatch):
    monkeypatch.setattr(gpu, "HAS_TRITON", has_triton)
    _report.cache_clear()
    q = torch.randn(1, 6, 2, width, device="cuda")
    with pytest.warns(RuntimeWarning, match=f'"chunked": .*{reason}'):
        lightning_attention(q, q, q, torch.ones(2, device="cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightning_attention(q, q, q, torch.ones(2, device="cuda"))
    _report.cache_clear()


def test_a_warning_is_given_once():
    _report.cache_clear()
    with pytest.warns(RuntimeWarning, match='"chunked": the GPU kernel takes K of 32, got 100'):
        _report("takes K of 32, got 100")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _report("takes K of 32, got 100")
    _report.cache_clear()
