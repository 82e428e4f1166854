"""Lightning attention beside its peers: forward, and forward with backward.

Peers: flash-linear-attention's `chunk_simple_gla`, OpenNLPLab's lightning attention 2, PyTorch's softmax attention
through cuDNN, and the floor: every tensor moved once at the copy rate measured in the same run.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from fulmen.bench.gpu import copy_rate, milliseconds, peak_bytes, relative_error, require, show
from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.chunked import chunked_lightning_attention
from fulmen.ops.lightning.triton import Tiling, triton_lightning_attention

HEADS, DIM = 64, 128
SHAPES = ((1, 8192), (1, 32768), (1, 131072), (8, 2048), (4, 8192))
SOFTMAX_UP_TO = 8192  # tokens; softmax attention is not worth the seconds beyond
SLOW_UP_TO = 32768
PACKED = (50, 4000, 700, 2300, 128, 1900, 333, 3000, 61, 2500, 1024, 388)  # tokens of the samples of one row
LENGTHS = tuple(2**i for i in range(12, 21))  # 4K..1M
TILINGS = [
    Tiling(*sizes)
    for sizes in (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 1),
    )
]  # fmt: skip


def inputs(batch: int, length: int, heads: int = HEADS) -> tuple[list[Tensor], Tensor]:
    shape = (batch, length, heads, DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    return [q, k, v], decay_rates(heads, 0, 80).cuda()


def relative_errors(tiling: Tiling | None = None, segment: int | None = None) -> dict[str, float]:
    """Of output and gradients against the chunked form in float64, at 2 x 1000."""
    leaves, rates = inputs(2, 1000)
    d_out = torch.randn_like(leaves[2])
    out = attention(*leaves, rates, tiling=tiling, segment=segment)
    got = [out, *torch.autograd.grad(out, leaves, d_out)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth, _ = chunked_lightning_attention(*doubles, rates, None, None)
    truths = [truth, *torch.autograd.grad(truth, doubles, d_out.double())]
    return {name: relative_error(*two) for name, *two in zip(("out", "d_q", "d_k", "d_v"), got, truths, strict=True)}


def attention(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, borders: Tensor | None = None, **options) -> Tensor:
    return triton_lightning_attention(q, k, v, rates, None, borders, **options)[0]


def both_ways(function, leaves: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of forward and backward."""
    d_out = torch.randn_like(leaves[2])
    with torch.no_grad():
        forward = milliseconds(function)
    return forward, milliseconds(lambda: torch.autograd.grad(function(), leaves, d_out))


def bench_peers() -> list[dict]:
    """Ours, the floor, every peer."""
    require(relative_errors(), 5e-3)
    rate = copy_rate()
    rows = [row(f"{batch} x {length}", batch, length, None, rate) for batch, length in SHAPES]
    borders = torch.tensor([0, *itertools.accumulate(PACKED)], dtype=torch.int32)
    return [*rows, row(f"packed, {len(PACKED)} samples", 1, sum(PACKED), borders, rate)]


def row(name: str, batch: int, length: int, borders: Tensor | None, rate: float) -> dict:
    """One line of the table, in milliseconds."""
    leaves, rates = inputs(batch, length)
    floor = leaves[0].nbytes / rate * 1e3
    line = {"shape": name, "floor forward": 4 * floor, "floor training": 11 * floor}
    peers = {"ours": functools.partial(attention, *leaves, rates, borders=borders), "fla": fla(leaves, rates, borders)}
    if length <= SOFTMAX_UP_TO or borders is not None:
        peers["softmax"] = softmax(leaves, borders)
    if length <= SLOW_UP_TO and borders is None:
        peers["lightning2"] = lightning2(leaves, rates)
    for peer, call in peers.items():
        if call is not None:
            line[f"{peer} forward"], line[f"{peer} training"] = both_ways(call, leaves)
    return show(line)


def fla(leaves: list[Tensor], rates: Tensor, borders: Tensor | None = None):
    """Flash-linear-attention's chunked form; None where it is not installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    borders = None if borders is None else borders.long().cuda()
    return lambda: chunk_simple_gla(*leaves, g_gamma=-rates, scale=1.0, cu_seqlens=borders)[0]


def lightning2(leaves: list[Tensor], rates: Tensor):
    """OpenNLPLab's kernel; None where it is not installed."""
    try:
        from lightning_attn.ops import lightning_attn_func
    except ImportError:
        return None
    return lambda: lightning_attn_func(*(x.transpose(1, 2).contiguous() for x in leaves), rates).transpose(1, 2)


def softmax(leaves: list[Tensor], borders: Tensor | None):
    """Causal softmax attention through cuDNN; with borders, sample after sample."""
    cuts = list(itertools.pairwise([0, leaves[0].shape[1]] if borders is None else borders.tolist()))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            parts = [
                F.scaled_dot_product_attention(*(x[:, a:b].transpose(1, 2) for x in leaves), is_causal=True)
                for a, b in cuts
            ]
        return parts[0].transpose(1, 2) if len(parts) == 1 else torch.cat(parts, dim=2).transpose(1, 2)

    return call


@torch.no_grad()
def bench_flatness() -> list[dict]:
    """Tokens a second of one layer's attention, forward, with 32 heads, from 4K to 1M tokens."""
    rows = []
    for length in (LENGTHS[0], *LENGTHS):
        (q, k, v), rates = inputs(1, length, heads=32)
        time = milliseconds(functools.partial(attention, q, k, v, rates), graph=True)
        rows.append({"length": length, "tokens a second": length / time * 1e3})
    return [show(line) for line in rows[1:]]  # the first is slow, whatever it is


def bench_memory() -> list[dict]:
    """Peak memory that forward and backward add at 256K tokens with 16 heads, beside fla's."""
    leaves, rates = inputs(1, 2**18, heads=16)
    d_out = torch.randn_like(leaves[2])
    line = {"q, k, v, out and gradients": 8 * leaves[0].nbytes}
    calls = {"ours": functools.partial(attention, *leaves, rates), "fla": fla(leaves, rates)}
    for peer, call in calls.items():
        if call is not None:
            line[peer] = peak_bytes(lambda call=call: torch.autograd.grad(call(), leaves, d_out))
    return [show(line)]


def bench_tilings() -> list[dict]:
    """Every tiling at two shapes: what `default_tiling` is chosen from."""
    rows = []
    for batch, length in ((1, 32768), (8, 2048)):
        leaves, rates = inputs(batch, length)
        for tiling, segment in itertools.product(TILINGS, (None, 8192) if batch == 1 else (None,)):
            line = {"shape": f"{batch} x {length}", "tiling": tuple(tiling), "segment": segment or "whole"}
            call = functools.partial(attention, *leaves, rates, tiling=tiling, segment=segment)
            try:
                is_right = max(relative_errors(tiling, 300).values()) <= 5e-3
                line["forward"], line["training"] = both_ways(call, leaves) if is_right else ("wrong", "wrong")
            except OutOfResources as error:
                line["forward"] = str(error)
            rows.append(show(line))
    return rows


TABLES = {"peers": bench_peers, "flatness": bench_flatness, "memory": bench_memory, "tilings": bench_tilings}
