"""Lightning attention on a GPU beside its peers: forward, and forward with backward, checked before it is timed.

    python bench/lightning.py              the table; results in bench/results/lightning.json
    python bench/lightning.py --tilings    every tiling at one shape: what `default_tiling` is chosen from

Peers: flash-linear-attention's `chunk_simple_gla` where it is installed, PyTorch's softmax attention through cuDNN, and
the floor: every tensor moved once at the copy rate measured in the same run.
"""

import argparse
import functools
import itertools

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.chunked import chunked_lightning_attention
from fulmen.ops.lightning.triton import Tiling, triton_lightning_attention
from fulmen.run.machine import describe_machine
from record import write_results

HEADS, DIM = 64, 128
SHAPES = ((1, 8192), (1, 32768), (1, 131072), (8, 2048), (4, 8192))
SOFTMAX_UP_TO = 8192  # tokens; softmax attention is not worth the seconds beyond
PACKED = (50, 4000, 700, 2300, 128, 1900, 333, 3000, 61, 2500, 1024, 388)  # tokens of the samples of one row
LENGTHS = tuple(2**i for i in range(12, 21))  # 4K..1M
TILINGS = [
    Tiling(*sizes)
    for sizes in (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 1),
    )
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tilings", action="store_true", help="compare tilings instead of peers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench_tilings() if arguments.tilings else bench_peers()


def inputs(batch: int, length: int) -> tuple[list[Tensor], Tensor]:
    shape = (batch, length, HEADS, DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    return [q, k, v], decay_rates(HEADS, 0, 80).cuda()


def relative_errors(tiling: Tiling | None, segment: int | None) -> dict[str, float]:
    """Of output and gradients against the chunked form in float64, at 2 x 1000."""
    leaves, rates = inputs(2, 1000)
    d_out = torch.randn_like(leaves[2])
    out, _ = triton_lightning_attention(*leaves, rates, None, None, tiling=tiling, segment=segment)
    got = [out, *torch.autograd.grad(out, leaves, d_out)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth, _ = chunked_lightning_attention(*doubles, rates, None, None)
    truths = [truth, *torch.autograd.grad(truth, doubles, d_out.double())]
    pairs = zip(("out", "d_q", "d_k", "d_v"), got, truths, strict=True)
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}


def milliseconds(call) -> float:
    return triton.testing.do_bench(call, warmup=20, rep=80, return_mode="median")


def copy_rate() -> float:
    """Bytes a second of a copy on the device, read and written."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (milliseconds(lambda: y.copy_(x)) * 1e-3)


def both_ways(function, leaves: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of forward and backward."""
    d_out = torch.randn_like(leaves[2])

    def training() -> None:
        torch.autograd.grad(function(), leaves, d_out)

    with torch.no_grad():
        forward = milliseconds(function)
    return forward, milliseconds(training)


def bench_tilings() -> None:
    print(f"copy rate {copy_rate() / 1e12:.2f} TB/s")
    for batch, length in ((1, 32768), (8, 2048)):
        leaves, rates = inputs(batch, length)
        for tiling, segment in itertools.product(TILINGS, (None, 8192) if batch == 1 else (None,)):
            ours = functools.partial(attention, *leaves, rates, tiling=tiling, segment=segment)
            try:
                errors = relative_errors(tiling, 300)
                times = both_ways(ours, leaves) if max(errors.values()) < 5e-3 else f"wrong: {errors}"
            except triton.runtime.errors.OutOfResources as error:
                times = error
            print(f"{batch} x {length} {tuple(tiling)} segment {segment}: {times}", flush=True)


def attention(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, borders: Tensor | None = None, **options) -> Tensor:
    return triton_lightning_attention(q, k, v, rates, None, borders, **options)[0]


def bench_peers() -> None:
    errors = relative_errors(None, None)
    print("relative errors", {name: f"{error:.1e}" for name, error in errors.items()})
    if not max(errors.values()) < 5e-3:
        raise SystemExit("wrong, so nothing is timed")
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s")
    results = {"copy_rate": rate, "errors": errors, "rows": []}
    flat_row(LENGTHS[0])  # the first is slow, whatever it is
    results["flat"] = [flat_row(length) for length in LENGTHS]
    for batch, length in SHAPES:
        results["rows"].append(row(f"{batch} x {length}", batch, length, None, rate))
    borders = torch.tensor([0, *itertools.accumulate(PACKED)], dtype=torch.int32)
    results["rows"].append(row(f"packed, {len(PACKED)} samples", 1, sum(PACKED), borders, rate))
    write_results("lightning", describe_machine("triton", "fla-core", device="cuda"), results)


def row(name: str, batch: int, length: int, borders: Tensor | None, rate: float) -> dict:
    """One line of the table, in milliseconds: ours, the floor, every peer."""
    leaves, rates = inputs(batch, length)
    floor = leaves[0].nbytes / rate * 1e3
    line = {"shape": name, "floor_forward": 4 * floor, "floor_training": 11 * floor}
    peers = {"ours": functools.partial(attention, *leaves, rates, borders=borders)}
    peers |= {
        "fla": fla(leaves, rates, borders),
        "softmax": softmax(leaves, borders) if length <= SOFTMAX_UP_TO else None,
    }
    for peer, call in peers.items():
        if call is not None:
            line[f"{peer}_forward"], line[f"{peer}_training"] = both_ways(call, leaves)
            print({k: v if isinstance(v, str) else round(v, 3) for k, v in line.items()}, flush=True)
    return line


def fla(leaves: list[Tensor], rates: Tensor, borders: Tensor | None):
    """Flash-linear-attention's chunked form; None where it is not installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    borders = None if borders is None else borders.long().cuda()
    return lambda: chunk_simple_gla(*leaves, g_gamma=-rates, scale=1.0, cu_seqlens=borders)[0]


def softmax(leaves: list[Tensor], borders: Tensor | None):
    """Causal softmax attention through cuDNN; with borders, sample after sample."""
    cuts = [0, leaves[0].shape[1]] if borders is None else borders.tolist()

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            parts = [
                F.scaled_dot_product_attention(*(x[:, a:b].transpose(1, 2) for x in leaves), is_causal=True)
                for a, b in itertools.pairwise(cuts)
            ]
        return parts[0].transpose(1, 2) if len(parts) == 1 else torch.cat(parts, dim=2).transpose(1, 2)

    return call


@torch.no_grad()
def flat_row(length: int) -> dict:
    """Tokens a second of one layer's attention, forward, with 32 heads."""
    q, k, v = (torch.randn(1, length, 32, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rates = decay_rates(32, 0, 80).cuda()
    seconds = milliseconds(functools.partial(attention, q, k, v, rates)) * 1e-3
    line = {"length": length, "tokens_per_second": length / seconds}
    print({k: round(v) for k, v in line.items()}, flush=True)
    return line


if __name__ == "__main__":
    main()
