"""Lightning attention of a GPU's batch in which some sequences bring one token and some more, over a pool of states.

A token that is decoded is bound by reading and writing its state, a longer input is a matter of products: each kind has
its own kernel, and the two can run side by side on two streams (MiniMax-01, section 3.3).
Letters: T tokens of N sequences laid end to end, S slots, H heads, K and V the widths of keys and values.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.ops.gpu import decoding
from fulmen.ops.lightning.triton import triton_lightning_attention, why_not


@torch.no_grad()
def lightning_batch_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    pool: Tensor,
    slots: Tensor,
    lengths: Sequence[int],
    *,
    silu: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> Tensor:
    """Advance the states of N sequences in place, each by its tokens; without gradients.

    Args:
        q, k: [T, H, K], strided as they come, their last dim contiguous; bf16, fp16 or fp32.
        v: [T, H, V], likewise, the dtype of q.
        rates: [H] fp32, see `fulmen.ops.lightning.decay_rates`.
        pool: [S, H, K, V] fp32, of each state a contiguous matrix; zeros for a sequence that begins.
        slots: [N] int32, the sequences' places in the pool, none twice. -1 pads the sequences of one token, and those
            alone: its outputs are zeros, and nothing of the pool is read or written.
        lengths: N tokens each, >= 1, known to the host (nothing is read back for them); those of one token first.
        silu: whether SiLU is taken of q, k and v first.
        stream: where the longer sequences run beside those of one token, if there are both: it waits for the current
            stream, which waits for it in turn. One of high priority lets their few programs in between. None: one
            kind after the other.

    Returns:
        Outputs [T, H, V], contiguous, the dtype of v.

    Raises:
        ValueError: a shape, dtype, device or length that does not fit, before the pool is touched.
    """
    _check_tensors(q, k, v, pool, slots)
    singles = _count_singles(lengths, len(q), len(slots))
    if singles == len(lengths):
        return decoding.lightning_step_(q, k, v, rates, pool, slots, silu=silu)
    _check_longer(q, v, stream)
    if singles == 0:
        return _longer_(q, k, v, rates, pool, slots, lengths, silu)
    head, rest = ([x[part] for x in (q, k, v)] for part in (slice(singles), slice(singles, None)))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if stream is not None:
        # Before the step is launched: the longer ones need not wait for that.
        current = torch.cuda.current_stream(q.device)
        stream.wait_stream(current)
    out[:singles] = decoding.lightning_step_(*head, rates, pool, slots[:singles], silu=silu)
    with torch.cuda.stream(stream):  # None: stays where it is
        out[singles:] = _longer_(*rest, rates, pool, slots[singles:], lengths[singles:], silu)
    if stream is not None:
        for x in (q, k, v, rates, pool, slots, out):
            x.record_stream(stream)
        current.wait_stream(stream)
    return out


def _longer_(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, pool: Tensor, slots: Tensor, lengths: Sequence[int], silu: bool
) -> Tensor:
    """The kernel for sequences of any length, on states that are gathered from the pool and put back."""
    if silu:
        q, k, v = (F.silu(x) for x in (q, k, v))
    slots = slots.long()  # `index_copy_` takes no other
    # On the host, which cuts the work by it.
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
    states = pool.index_select(0, slots)
    out, states = triton_lightning_attention(q[None], k[None], v[None], rates, states, borders)
    pool.index_copy_(0, slots, states)
    return out[0]


def _count_singles(lengths: Sequence[int], tokens: int, slots: int) -> int:
    """How many sequences of one token lead the batch."""
    if min(lengths, default=0) < 1:
        raise ValueError(f"lengths must name at least one sequence and be >= 1; leave empty ones out, got {lengths}")
    if sum(lengths) != tokens:
        raise ValueError(f"lengths must add up to the T == {tokens} tokens of q, got {sum(lengths)} of {lengths}")
    if len(lengths) != slots:
        raise ValueError(f"slots must be one of each sequence, got {slots} slots and {len(lengths)} lengths {lengths}")
    singles = sum(length == 1 for length in lengths)
    if any(length != 1 for length in lengths[:singles]):
        raise ValueError(f"sequences of one token must come first; sort them by length, got lengths {lengths}")
    return singles


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"a batch takes q, k [T, H, K] and v [T, H, V], its sequences laid end to end, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype; convert them, got {q.dtype}, {k.dtype}, {v.dtype}")
    if any(x.stride(2) != 1 for x in (q, k, v)):
        strides = ", ".join(str(x.stride()) for x in (q, k, v))
        raise ValueError(f"the last dim of q, k and v must be contiguous; call .contiguous(), got strides {strides}")
    shape = (q.shape[1], q.shape[2], v.shape[2])
    if pool.shape[1:] != shape or pool.dtype != torch.float32 or pool.stride()[2:] != (shape[2], 1):
        got = f"{tuple(pool.shape)} {pool.dtype} of strides {pool.stride()}"
        raise ValueError(f"pool must be [S, H, K, V] with {shape} behind S, fp32, each state contiguous, got {got}")
    if slots.dim() != 1 or slots.dtype != torch.int32:
        raise ValueError(f"slots must be [N] int32; convert them, got {tuple(slots.shape)} {slots.dtype}")


def _check_longer(q: Tensor, v: Tensor, stream: torch.cuda.Stream | None) -> None:
    """What the kernel for longer sequences would refuse when those of one token have already changed the pool."""
    refusal = why_not(q[None], v[None])
    if refusal is not None:
        raise ValueError(f"sequences of more than one token need the GPU kernel, which {refusal}")
    if stream is not None and stream.device != q.device:
        raise ValueError(f"stream must be one of q's device {q.device}; make it there, got {stream.device}")
