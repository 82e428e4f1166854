"""The next token's kernel, states in slots of a pool, beside flash-linear-attention's `fused_recurrent_simple_gla`.

And a batch in which a few sequences bring more than a token: all through one kernel, or each kind through its own.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fulmen.bench.gpu import attempt, copy_rate, milliseconds, quotient, relative_error, require, show
from fulmen.ops import gpu
from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.batch import lightning_batch_
from fulmen.ops.lightning.naive import naive_lightning_attention
from fulmen.ops.lightning.triton import triton_lightning_attention

HEADS, DIM = 64, 128
BATCHES = (1, 8, 32, 128, 256)
SEQUENCES, PIECE = 20, 50
"""The report's batch, and the tokens of each sequence in it that does not decode (MiniMax-01, section 3.3)."""


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


@torch.no_grad()
def bench_mixed() -> list[dict]:
    """Milliseconds of batches in which 0, 1 or 2 sequences bring a piece of a prompt, as a CUDA graph and launched."""
    rate, rows = copy_rate(), []
    for longer in range(3):
        batch = mixed_inputs((1,) * (SEQUENCES - longer) + (PIECE,) * longer)
        require(mixed_errors(*batch), 5e-3)
        moved = 2 * SEQUENCES * HEADS * DIM * DIM * 4
        line = {"sequences": SEQUENCES, f"of {PIECE} tokens": longer, "floor": moved / rate * 1e3}
        for name, form in mixed_forms().items():
            call = functools.partial(form, *batch)
            line[f"{name} launched"] = milliseconds(call)
            line[name] = attempt(functools.partial(milliseconds, call, graph=True))
        line["gain of splitting"] = quotient(line["one kernel"], line["split"])
        line["gain of both"] = quotient(line["one kernel"], line["split, two streams"])
        rows.append(show(line))
    return rows


def mixed_forms() -> dict[str, Callable[..., Tensor]]:
    """Ways to advance a batch, of one signature; the few programs of longer sequences go before the many others."""
    stream = torch.cuda.Stream(priority=-1)
    two_streams = functools.partial(lightning_batch_, stream=stream)
    return {"one kernel": one_kernel_, "split": lightning_batch_, "split, two streams": two_streams}


def one_kernel_(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, pool: Tensor, slots: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """`lightning_batch_` by the kernel for longer sequences alone: all states are gathered and put back."""
    slots = slots.long()
    states = pool.index_select(0, slots)
    out, states = triton_lightning_attention(q[None], k[None], v[None], rates, states, borders_of(lengths))
    pool.index_copy_(0, slots, states)
    return out[0]


def mixed_inputs(lengths: tuple[int, ...]) -> tuple:
    """Arguments of `lightning_batch_`, q, k and v out of one projection."""
    q, k, v = torch.randn(sum(lengths), HEADS, 3, DIM, device="cuda", dtype=torch.bfloat16).unbind(2)
    pool = torch.randn(len(lengths) + 1, HEADS, DIM, DIM, device="cuda")
    slots = torch.randperm(len(lengths) + 1, device="cuda")[: len(lengths)].int()
    return q, k, v, decay_rates(HEADS, 0, 80).cuda(), pool, slots, lengths


def mixed_errors(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, pool: Tensor, slots: Tensor, lengths: tuple[int, ...]
) -> dict[str, float]:
    """Relative errors of every form's outputs and states; the pool stays as it is."""
    doubles, used = (x[None].double() for x in (q, k, v)), slots.long()
    truth, states = naive_lightning_attention(*doubles, rates, pool[used].double(), borders_of(lengths))
    errors = {}
    for name, form in mixed_forms().items():
        changed = pool.clone()
        out = form(q, k, v, rates, changed, slots, lengths)
        errors |= {name: relative_error(out, truth[0]), f"{name}, state": relative_error(changed[used], states)}
    return errors


def borders_of(lengths: tuple[int, ...]) -> Tensor:
    """[N+1] int32, on the host, where the kernel's work is cut by them."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


TABLES = {"kernel": bench_kernel, "mixed": bench_mixed}
