"""The next token's kernel, states in slots of a pool, beside flash-linear-attention's `fused_recurrent_simple_gla`."""

import torch

from fulmen.bench.gpu import copy_rate, milliseconds, relative_error, require, show
from fulmen.ops import gpu
from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.naive import naive_lightning_attention

HEADS, DIM = 64, 128
BATCHES = (1, 8, 32, 128, 256)


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(3, batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    pool = torch.randn(batch + 1, HEADS, DIM, DIM, device="cuda")
    slots = torch.randperm(batch + 1, device="cuda")[:batch].int()
    return q, k, v, decay_rates(HEADS, 0, 80).cuda(), pool, slots


@torch.no_grad()
def bench_kernel() -> list[dict]:
    """Milliseconds of a step, as a CUDA graph and launched alone, and the share of the copy rate."""
    q, k, v, rates, pool, slots = inputs(8)
    truth, states = naive_lightning_attention(
        *(x[:, None].double() for x in (q, k, v)), rates, pool[slots.long()].double(), None
    )
    out = gpu.decoding.lightning_step_(q, k, v, rates, pool, slots)
    errors = {"out": relative_error(out, truth[:, 0]), "state": relative_error(pool[slots.long()], states)}
    require(errors, 5e-3)
    rate, rows = copy_rate(), []
    for batch in BATCHES:
        tensors = inputs(batch)
        moved = 2 * batch * HEADS * DIM * DIM * 4

        def step(tensors=tensors):
            gpu.decoding.lightning_step_(*tensors)

        line = {"batch": batch, "floor": moved / rate * 1e3, "ours": milliseconds(step, graph=True)}
        line |= {"ours launched": milliseconds(step), "share of the copy rate": line["floor"] / line["ours"]}
        peer = fla(tensors)
        if peer is not None:
            line["fla launched"] = milliseconds(peer)
            line["fla"] = milliseconds(peer, graph=True)
        rows.append(show(line))
    return rows


def fla(tensors: tuple[torch.Tensor, ...]):
    """The peer with states that lie together; None where it is not installed."""
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError:
        return None
    q, k, v, rates, pool, slots = tensors
    q, k, v, states = q[:, None], k[:, None], v[:, None], pool[: len(slots)]
    return lambda: fused_recurrent_simple_gla(
        q, k, v, g_gamma=-rates, scale=1.0, initial_state=states, output_final_state=True
    )


TABLES = {"kernel": bench_kernel}
