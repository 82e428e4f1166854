"""The GPU kernel beside the recurrence in float64: on a GPU where there is one, else under Triton's interpreter."""

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()


def check(gpu_device, case, compare, tolerance, block, columns, segment):
    from fulmen.ops.lightning.triton import Tiling, triton_lightning_attention

    def run(q, k, v, rates, state, cu_seqlens):
        tiling = Tiling(block=block, columns=columns, warps=4, stages=2)
        return triton_lightning_attention(q, k, v, rates, state, cu_seqlens, tiling=tiling, segment=segment)

    moved = case._replace(**{n: x.to(gpu_device) for n, x in case._asdict().items() if x is not None})
    compare({n: x.cpu() for n, x in moved.results(run).items()}, case.truth(), tolerance)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("segment", [1000, 32, 20])
def test_lengths_and_segments(gpu_device, make_case, compare, poisoned_memory, length, segment):
    case = make_case(length, batch=2, key_dim=32, value_dim=32)
    check(gpu_device, case, compare, 1e-5, block=16, columns=16, segment=segment)


@pytest.mark.parametrize("segment", [1000, 32])
@pytest.mark.parametrize("layer", [0, 78])
def test_packed_samples(gpu_device, make_case, compare, poisoned_memory, segment, layer):
    case = make_case(90, borders=[0, 1, 3, 40, 56, 90], layer=layer, key_dim=32, value_dim=64)
    check(gpu_device, case, compare, 1e-5, block=16, columns=32, segment=segment)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 96), (96, 32), (128, 128), (256, 256)])
def test_widths(gpu_device, make_case, compare, poisoned_memory, key_dim, value_dim):
    case = make_case(40, heads=(0, 63), key_dim=key_dim, value_dim=value_dim)
    check(gpu_device, case, compare, 1e-5, block=16, columns=32, segment=32)


def test_half_precision(gpu_device, make_case, compare):
    # The interpreter multiplies bf16 wrongly; fp16 stands in for it there.
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    case = make_case(100, dtype=dtype, key_dim=32, value_dim=32)
    check(gpu_device, case, compare, 5e-3, block=32, columns=32, segment=64)


@pytest.mark.parametrize("borders", [None, [0, 1, 30, 95, 96]])
@pytest.mark.parametrize("segment", [1000, 32])
def test_silu_of_projections(gpu_device, compare, monkeypatch, poisoned_memory, borders, segment):
    from fulmen.ops import gpu
    from fulmen.ops.lightning import decay_rates, silu_lightning_attention, triton
    from fulmen.ops.lightning.naive import naive_lightning_attention

    monkeypatch.setattr(gpu, "serves", lambda *_: True)
    monkeypatch.setattr(triton, "_segment_length", lambda *_: segment)
    samples = 2 if borders is None else len(borders) - 1
    batch = 2 if borders is None else 1
    tensors = (torch.randn(batch, 96, 2, 3, 32), torch.randn(samples, 2, 32, 32), torch.randn(batch, 96, 2, 32))
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    results = []
    for is_truth in (False, True):
        device, dtype = ("cpu", torch.float64) if is_truth else (gpu_device, torch.float32)
        qkv, state, d_out = (x.to(device, dtype).requires_grad_() for x in tensors)
        rates = decay_rates(2, 1, 4).to(device)
        if is_truth:
            q, k, v = torch.nn.functional.silu(qkv).unbind(3)
            out, final = naive_lightning_attention(q, k, v, rates, state, cu_seqlens)
        else:
            out, final = silu_lightning_attention(qkv, rates, state=state, cu_seqlens=cu_seqlens, return_state=True)
        d_qkv, d_state = torch.autograd.grad((out * d_out).sum() + final.square().sum(), (qkv, state))
        named = {"out": out, "final": final, "d_qkv": d_qkv, "d_state": d_state}
        results.append({name: x.detach().cpu() for name, x in named.items()})
    compare(*results, 1e-5)


def test_nan_stays_in_its_sample(gpu_device, make_case):
    from fulmen.ops.lightning.triton import triton_lightning_attention

    case = make_case(60, borders=[0, 20, 40, 60], key_dim=32, value_dim=32)
    case.k[:, 25] = float("nan")
    moved = case._replace(**{n: x.to(gpu_device) for n, x in case._asdict().items()})
    for name, x in moved.results(triton_lightning_attention).items():
        others = x[[0, 2]] if name in ("final", "d_state") else x[:, [*range(20), *range(40, 60)]]
        assert others.isfinite().all(), name


@pytest.mark.parametrize(("key_dim", "dtype", "rule"), [(100, torch.float32, "got 100"), (32, torch.float64, "bf16")])
def test_refusals(gpu_device, make_case, key_dim, dtype, rule):
    from fulmen.ops.lightning.triton import triton_lightning_attention

    case = make_case(8, key_dim=key_dim, value_dim=32, dtype=dtype)
    with pytest.raises(ValueError, match=rule):
        triton_lightning_attention(*(x.to(gpu_device) for x in case[:5]), None)


def test_cpu_tensors_are_refused(gpu_device, make_case, monkeypatch):
    import triton

    from fulmen.ops.lightning.triton import triton_lightning_attention

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="CUDA device, got cpu"):
        triton_lightning_attention(*make_case(8, key_dim=32, value_dim=32)[:5], None)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too long for the interpreter")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 5e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("borders", [None, "random"])
@pytest.mark.parametrize("length", [1, 63, 1000, 4097, 70_000])
def test_long_on_a_gpu(make_case, compare, poisoned_memory, length, borders, dtype, tolerance):
    """Beside the chunked form in float64, which the recurrence holds elsewhere; two runs are equal bit for bit."""
    from fulmen.ops.lightning.chunked import chunked_lightning_attention
    from fulmen.ops.lightning.triton import triton_lightning_attention

    if borders is not None:
        borders = sorted({0, length, *torch.randint(1, length + 1, (20,)).tolist()})
    case = make_case(length, borders=borders, heads=(0, 20, 40, 63), key_dim=128, value_dim=128, dtype=dtype)
    case = case._replace(**{n: x.cuda() for n, x in case._asdict().items() if x is not None})
    names = ("q", "k", "v", "state", "d_out", "d_final")
    truth = case._replace(**{n: getattr(case, n).double() for n in names}).results(chunked_lightning_attention)
    results = case.results(triton_lightning_attention)
    compare(results, truth, tolerance)
    again = case.results(triton_lightning_attention)
    assert all(torch.equal(results[name], again[name]) for name in results)
