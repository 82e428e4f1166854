"""Lightning attention beside its peers: forward, and forward with backward.

Peers: flash-linear-attention's `chunk_simple_gla`, OpenNLPLab's lightning attention 2, PyTorch's softmax attention
through cuDNN, and the floor: every tensor moved once at the copy rate measured in the same run. A peer that fails
leaves one line of text in place of its time.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from fulmen.bench.gpu import (
    attempt,
    copy_rate,
    free_memory,
    milliseconds,
    milliseconds_alone,
    peak_bytes,
    quotient,
    relative_error,
    require,
    show,
)
from fulmen.model import ModelConfig
from fulmen.model.lightning import LightningAttention
from fulmen.ops.lightning import decay_rates, lightning_attention
from fulmen.ops.lightning.chunked import chunked_lightning_attention
from fulmen.ops.lightning.triton import Tiling, triton_lightning_attention

HEADS, DIM = 64, 128
SHAPES = ((1, 8192), (1, 32768), (1, 131072), (8, 2048), (4, 8192))
SOFTMAX_UP_TO = 8192  # tokens; softmax attention is not worth the seconds beyond
SLOW_UP_TO = 32768
PACKED = (50, 4000, 700, 2300, 128, 1900, 333, 3000, 61, 2500, 1024, 388)  # tokens of the samples of one row
LENGTHS = tuple(2**i for i in range(10, 18))  # 1K..128K
LENGTHS_SOFTMAX_UP_TO = 32768
LONG_LENGTHS = tuple(2**i for i in range(12, 21))  # 4K..1M
MEMORY_LENGTH = 2**18
LAYER = ModelConfig.preset("1b", num_heads=16, num_kv_heads=4)  # hidden 1024, heads of 128
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


def forward_time(function) -> float:
    """Milliseconds."""
    with torch.no_grad():
        return milliseconds(function)


def training_time(function, leaves: list[Tensor]) -> float:
    """Milliseconds of forward and backward."""
    d_out = torch.randn_like(leaves[2])
    return milliseconds(lambda: torch.autograd.grad(function(), leaves, d_out))


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
    peers = {"ours": functools.partial(attention, *leaves, rates, borders=borders), "fla": fla(leaves, rates, borders)}
    if length <= SOFTMAX_UP_TO or borders is not None:
        peers["softmax"] = softmax(leaves, borders)
    if length <= SLOW_UP_TO and borders is None:
        peers["lightning2"] = lightning2(leaves, rates)
    return show({"shape": name} | compare(peers, leaves, rate))


def compare(peers: dict, leaves: list[Tensor], rate: float) -> dict:
    """Milliseconds of the floor and of every peer that there is, and how they stand to ours."""
    floor = leaves[0].nbytes / rate * 1e3
    line = {"floor forward": 4 * floor, "floor training": 11 * floor}
    for peer, call in peers.items():
        if call is not None:
            line[f"{peer} forward"] = attempt(lambda call=call: forward_time(call))
            line[f"{peer} training"] = attempt(lambda call=call: training_time(call, leaves))
    free_memory()
    return line | ratios(line)


def ratios(line: dict) -> dict[str, float]:
    """Fla's times over ours, and ours over the floor, as far as they were measured."""
    pairs = (("fla", "ours", "forward"), ("fla", "ours", "training"), ("ours", "floor", "forward"))
    found = {f"{a} / {b} {what}": quotient(line.get(f"{a} {what}"), line.get(f"{b} {what}")) for a, b, what in pairs}
    return {name: value for name, value in found.items() if value is not None}


def bench_lengths() -> list[dict]:
    """One sequence of growing length, ours beside fla and softmax, called from Python."""
    rate, rows = copy_rate(), []
    for length in (LENGTHS[0], *LENGTHS):  # the first is slow, whatever it is
        leaves, rates = inputs(1, length)
        peers = {"ours": functools.partial(attention, *leaves, rates), "fla": fla(leaves, rates)}
        if length <= LENGTHS_SOFTMAX_UP_TO:
            peers["softmax"] = softmax(leaves, None)
        rows.append({"length": length} | compare(peers, leaves, rate))
        if len(rows) > 1:
            show(rows[-1])
    return rows[1:]


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
    """Tokens a second of attention alone, forward, with 32 heads and with the released model's 64, 4K to 1M tokens."""

    def rate(heads: int, length: int) -> float:
        # A million tokens of 64 heads are 17 GB a tensor: nothing is allocated but q, k, v and the output.
        shape, rates = (1, length, heads, DIM), decay_rates(heads, 0, 80).cuda()
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        return length / milliseconds_alone(lambda: lightning_attention(q, k, v, rates)) * 1e3

    return [show({"heads": heads} | flat_rates(functools.partial(rate, heads))) for heads in (32, 64)]


@torch.no_grad()
def bench_layer() -> list[dict]:
    """Tokens a second of a whole lightning attention layer in bf16, forward, from 4K to 1M tokens."""
    layer = LightningAttention(LAYER, 0).cuda().bfloat16()
    layer.init_weights(1.0)

    def rate(length: int) -> float:
        x = torch.randn(1, length, LAYER.hidden_size, device="cuda", dtype=torch.bfloat16)
        return length / milliseconds_alone(lambda: layer(x)) * 1e3

    return [show({"hidden": LAYER.hidden_size, "heads": LAYER.num_heads} | flat_rates(rate))]


def flat_rates(rate) -> dict:
    """Tokens a second by length, and the spread of those that were measured."""
    attempt(lambda: rate(LONG_LENGTHS[0]))  # the first is slow, whatever it is
    found = {}
    for length in LONG_LENGTHS:
        found[str(length)] = attempt(lambda length=length: rate(length))
        free_memory()
        print(f"    {length}: {found[str(length)]}", flush=True)
    return found | {"spread": spread([value for value in found.values() if not isinstance(value, str)])}


def spread(values: list[float]) -> float | None:
    """(max - min) / max."""
    return (max(values) - min(values)) / max(values) if values else None


def bench_memory() -> list[dict]:
    """Peak memory that forward and backward add at 256K tokens, beside fla's, which tries kernels for minutes first."""
    leaves, rates = inputs(1, MEMORY_LENGTH, heads=32)
    d_out, rows = torch.randn_like(leaves[2]), []
    for name, call in {"ours": functools.partial(attention, *leaves, rates), "fla": fla(leaves, rates)}.items():
        if call is not None:
            line = {"name": name, "bytes of q, k, v, out and gradients": 8 * leaves[0].nbytes}
            rows.append(show(line | {"peak": attempt(lambda call=call: peak_of_gradients(call, leaves, d_out))}))
            free_memory()
    return rows


def peak_of_gradients(call, leaves: list[Tensor], d_out: Tensor) -> int:
    """Bytes; not of the first call, which may try several tilings."""
    torch.autograd.grad(call(), leaves, d_out)
    return peak_bytes(lambda: torch.autograd.grad(call(), leaves, d_out))


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
                line["forward"] = forward_time(call) if is_right else "wrong"
                line["training"] = training_time(call, leaves) if is_right else "wrong"
            except OutOfResources as error:
                line["forward"] = str(error)
            rows.append(show(line))
    return rows


TABLES = {
    "peers": bench_peers,
    "lengths": bench_lengths,
    "flatness": bench_flatness,
    "layer": bench_layer,
    "memory": bench_memory,
}
EXTRA_TABLES = {"tilings": bench_tilings}
"""Only where asked for: it takes minutes, and tells something to who works on the kernel alone."""
