"""The GPU kernel beside the recurrence in float64: on a GPU where there is one, else under Triton's interpreter."""

import functools
import json

import pytest
import torch

from fulmen.ops.lightning.context import Context

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


class Trials(list):
    """Passes of every timed run, on a clock that likes one tiling; `file` holds the answers."""

    def __init__(self, file, fastest):
        self.file, self.fastest = file, fastest

    def answers(self):
        return json.loads(self.file.read_text()) if self.file.exists() else {}


@pytest.fixture
def trials(gpu_device, tmp_path, monkeypatch):
    """Every call is worth a trial, in a new process as it were, and the clock is the test's."""
    from fulmen.ops.gpu import tuning
    from fulmen.ops.lightning import tiling, triton

    trials, tilings = Trials(tmp_path / "fulmen" / "choices-test.json", "narrow"), []

    def watch(name):
        original = getattr(triton._Lightning, name)

        def call(context, *arguments):
            if isinstance(context, Context):
                trials[-1].append(name)
            return original(context, *arguments)

        monkeypatch.setattr(triton._Lightning, name, staticmethod(call))

    def seconds(run):
        trials.append([])
        run()
        return 1.0 if tilings[-1] == tiling.candidates(torch.float16, 32, 32)[trials.fastest] else 2.0

    def trial(*arguments, **options):
        tilings.append(arguments[4])
        return original_trial(*arguments, **options)

    original_trial = triton._trial
    watch("forward")
    watch("backward")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton, "_trial", trial)
    monkeypatch.setattr(tiling, "_book", lambda _: trials.file.name)
    monkeypatch.setattr(tiling, "is_worth_a_trial", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "gpu_seconds", seconds)
    tuning._taken.cache_clear()
    yield trials
    tuning._taken.cache_clear()


@pytest.fixture
def half_case(gpu_device, make_case):
    case = make_case(96, borders=[0, 60, 96], key_dim=32, value_dim=32, dtype=torch.float16)
    return case._replace(**{n: x.to(gpu_device) for n, x in case._asdict().items()})


QUESTION = "torch.float16 K=32 V=32 heads=3 tokens=64 samples=2"


def test_the_fastest_tiling_is_taken(trials, half_case):
    from fulmen.ops.lightning import tiling, triton

    narrow = tiling.candidates(torch.float16, 32, 32)["narrow"]
    chosen = half_case.results(triton.triton_lightning_attention)
    assert trials == [["forward", "backward"]] * 3
    assert trials.answers() == {f"{QUESTION} forward and backward": "narrow"}
    expected = half_case.results(functools.partial(triton.triton_lightning_attention, tiling=narrow))
    trials.fastest = "shallow"
    again = half_case.results(triton.triton_lightning_attention)
    assert len(trials) == 3
    assert all(torch.equal(chosen[n], expected[n]) and torch.equal(again[n], expected[n]) for n in expected)


@pytest.mark.parametrize("why", ["no grad", "no leaf"])
def test_without_gradients_the_forward_pass_decides(trials, half_case, why):
    from fulmen.ops.lightning.triton import triton_lightning_attention

    half_case.k.requires_grad_(why == "no grad")
    with torch.set_grad_enabled(why != "no grad"):
        triton_lightning_attention(*half_case[:6])
    assert trials == [["forward"]] * 3
    assert trials.answers() == {f"{QUESTION} forward": "narrow"}


def test_trials_of_silu_leave_no_trace(trials):
    """Neither in gradients nor in what autograd keeps, which checkpointing counts."""
    from fulmen.ops.lightning.triton import triton_silu_lightning_attention

    device = "cpu" if INTERPRETED else "cuda"
    qkv = torch.randn(2, 40, 3, 3, 32, device=device).half().requires_grad_()
    rates, before, kept = torch.rand(3, device=device), qkv.detach().clone(), []
    for _ in range(2):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(tuple(x.shape)) or x, lambda x: x):
            triton_silu_lightning_attention(qkv, rates, None, None)
    assert trials == [["forward", "backward"]] * 3
    assert kept[0] == kept[1]
    assert qkv.grad is None
    assert torch.equal(qkv, before)


def test_nothing_is_timed_while_a_graph_is_recorded(trials, half_case, monkeypatch):
    """The default is taken then, and by later calls of this process too."""
    from fulmen.ops.gpu import tuning
    from fulmen.ops.lightning import tiling, triton

    asked, narrow = [], tiling.candidates(torch.float16, 32, 32)["narrow"]
    monkeypatch.setattr(tiling, "default_tiling", lambda *arguments: asked.append(arguments) or narrow)
    with torch.no_grad():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        triton.triton_lightning_attention(*half_case[:6])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        triton.triton_lightning_attention(*half_case[:6])
    assert trials == []
    assert trials.answers() == {}
    assert tuning._taken(trials.file.name) == {f"{QUESTION} forward": "narrow"}
    assert asked[0][3] == 3 * 2  # heads times samples


def test_a_tiling_too_large_for_the_gpu_loses(trials, half_case, monkeypatch):
    from fulmen.ops.gpu import tuning
    from fulmen.ops.lightning import triton

    seconds = tuning.gpu_seconds

    def clock(run):
        if len(trials) == 2:
            trials.append([])
            raise triton.OutOfResources(2, 1, "shared memory")
        return seconds(run)

    trials.fastest = "shallow"
    monkeypatch.setattr(tuning, "gpu_seconds", clock)
    with torch.no_grad():
        triton.triton_lightning_attention(*half_case[:6])
    assert len(trials) == 3
    assert list(trials.answers().values()) == ["wide"]


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


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU's clock")
def test_tilings_are_timed_on_a_gpu(make_case, tmp_path, monkeypatch):
    """Once for all calls alike, and a recorded graph computes what the calls beside it do, bit for bit."""
    from fulmen.ops.gpu import tuning
    from fulmen.ops.lightning import tiling, triton

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._taken.cache_clear()
    timed, seconds = [], tuning.gpu_seconds
    monkeypatch.setattr(tuning, "gpu_seconds", lambda run: timed.append(seconds(run)) or timed[-1])
    case = make_case(30_000, heads=(0, 20, 40, 63), key_dim=128, value_dim=128, dtype=torch.bfloat16)
    case = case._replace(**{n: x.cuda() for n, x in case._asdict().items() if x is not None})
    first, second = (case.results(triton.triton_lightning_attention) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(timed) == 3
    assert all(0 < time < 1 for time in timed)
    with torch.no_grad():
        out, _ = triton.triton_lightning_attention(*case[:6])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded, _ = triton.triton_lightning_attention(*case[:6])
    graph.replay()
    assert torch.equal(recorded, out)
    assert len(timed) == 6
    (file,) = (tmp_path / "fulmen").iterdir()
    assert set(json.loads(file.read_text()).values()) <= tiling.candidates(torch.bfloat16, 128, 128).keys()
    tuning._taken.cache_clear()
