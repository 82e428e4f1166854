"""The block form: any cut gives the same result, nothing leaks, nothing is left unwritten, little is kept."""

import pytest
import torch

from fulmen.ops.cpu import training
from fulmen.ops.lightning import lightning_attention
from fulmen.ops.lightning.chunked import chunked_lightning_attention

TOLERANCE = 1e-5


@pytest.fixture(autouse=True, params=[True, False], ids=["kernels", "fallback"])
def _choose(request, monkeypatch):
    """With the scan in C, and without."""
    if request.param:
        assert training.load() is not None, "the kernels should build on a machine that runs the tests"
    else:
        monkeypatch.setattr(training, "load", lambda: None)


def blocks_of(block=None, segment=None):
    def function(q, k, v, rates, state, cu_seqlens):
        return chunked_lightning_attention(q, k, v, rates, state, cu_seqlens, block=block, segment=segment)

    return function


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("segment", [1, 3, 100])
def test_neither_block_nor_segment_changes_the_result(block, segment, make_case, compare):
    case = make_case(517, layer=30)
    compare(case.results(blocks_of(block, segment)), case.truth(), TOLERANCE)


@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("borders", [[0, 16, 32, 48, 96], [0, 1, 17, 18, 32, 33, 96, 97], [0, 5, 100], [0, 31, 32, 33]])
def test_borders_on_edges_of_blocks_and_segments(borders, segment, make_case, compare):
    case = make_case(borders[-1], layer=5, borders=borders)
    compare(case.results(blocks_of(16, segment)), case.truth(), TOLERANCE)


@pytest.mark.parametrize("block", [1, 7, 24, 300])
def test_blocks_need_not_be_powers_of_two(block, make_case, compare):
    case = make_case(75, batch=2)
    compare(case.results(blocks_of(block, 2)), case.truth(), TOLERANCE)


def test_states_of_bf16_inputs_are_summed_in_fp32_over_many_blocks(make_case, compare):
    """A hundred sums in bf16 would be off by per cents: what is rounded is a block's update, never the sum."""
    case = make_case(1600, layer=78, dtype=torch.bfloat16)
    compare(case.results(blocks_of(16)), case.truth(), 5e-3)


@pytest.mark.parametrize("borders", [None, [0, 1, 6, 8, 11]])
def test_gradcheck(borders, make_case):
    case = make_case(11, borders=borders, heads=(0, 40), key_dim=2, value_dim=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.state)]
    function = blocks_of(4, 2)
    assert torch.autograd.gradcheck(
        lambda q, k, v, state: function(q, k, v, case.rates.double(), state, case.cu_seqlens), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("borders", [None, [0, 1, 64, 65, 200], [0, 64, 192], [0, 200, 333]])
def test_every_element_is_written(borders, dtype, make_case, poisoned_memory):
    case = make_case(333 if borders is None else borders[-1], borders=borders, dtype=dtype)
    for name, x in case.results(blocks_of()).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("name", ["q", "k", "v", "state", "d_out", "d_final"])
@pytest.mark.parametrize("borders", [[0, 64, 128, 192], [0, 50, 51, 130]])
def test_a_nan_stays_in_its_sample(borders, name, make_case):
    case = make_case(borders[-1], borders=borders)
    clean = case.results(blocks_of(16, 3))
    poisoned = getattr(case, name).clone()
    # The middle sample's last token, or its state, is bad.
    poisoned[1 if "state" in name or "final" in name else (0, borders[2] - 1)] = float("nan")
    results = case._replace(**{name: poisoned}).results(blocks_of(16, 3))
    middle = slice(borders[1], borders[2])
    assert any(x.isnan().any() for x in results.values())
    for key, x in results.items():
        others = [0, 2] if key in ("final", "d_state") else torch.ones(borders[-1], dtype=torch.bool)
        if isinstance(others, torch.Tensor):
            others[middle] = False
            x, expected = x[:, others], clean[key][:, others]
        else:
            x, expected = x[others], clean[key][others]
        assert torch.equal(x, expected), key


def test_our_tolerance_rejects_the_known_public_fault(make_case, oracle, relative_error):
    """A widely used kernel reads the state before a block with exp(-s i) instead of exp(-s (i + 1))."""
    case, block = make_case(600), 256
    expected, _ = oracle(case.q, case.k, case.v, case.rates)
    faulty = lightning_attention(case.q, case.k, case.v, case.rates)[0].clone()
    place = torch.arange(block)[:, None, None]
    for start in range(block, 600, block):
        part = slice(start, start + block)
        _, state = oracle(case.q[:, :start], case.k[:, :start], case.v[:, :start], case.rates)
        reads = torch.einsum("bthk,bhkv->bthv", case.q[:, part].double(), state)
        decay = torch.exp(-case.rates.double()[:, None] * place[: reads.shape[1]])
        faulty[:, part] += (reads * (decay - decay * torch.exp(-case.rates.double()[:, None]))).float()
    assert relative_error(faulty[:, :block], expected[:, :block]) <= TOLERANCE
    assert relative_error(faulty[:, block:], expected[:, block:]) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_keeps_a_few_tensors_of_the_inputs_size(dtype, make_case):
    length = 8192
    case = make_case(length, heads=(0, 20, 40, 63), key_dim=64, value_dim=64, dtype=dtype)
    kept = []

    def pack(x):
        kept.append(x.numel() * x.element_size())
        return x

    q = case.q.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, _ = lightning_attention(q, case.k, case.v, case.rates, state=case.state, backend="chunked")
    one = out.numel() * out.element_size()
    # A state per block of 64 would be 128 states of 4 x 64 x 64: two such tensors in bf16, more at wider heads.
    assert 3 * one <= sum(kept) <= 3.6 * one
