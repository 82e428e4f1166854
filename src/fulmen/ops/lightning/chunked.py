"""Lightning attention by blocks: matrix products on any device, with a backward that keeps no block states.

Letters: N samples, G blocks of at most C tokens, H heads, K and V the widths of keys and values. README.md beside this
file derives the formulas.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one operand that a segment of blocks may hold: about what stays in a CPU's outer cache, or fills a GPU.
SEGMENT_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


@torch.compiler.disable
def chunked_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    block: int | None = None,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [B or N, H, K, V]; see `fulmen.ops.lightning.lightning_attention`.

    `block` tokens form a block and `segment` blocks are computed at a time; the result depends on neither beyond
    rounding. Products run in the inputs' dtype, states are summed in fp32 (fp64 for fp64 inputs).
    """
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[3]
    borders = list(range(0, batch * length + 1, length)) if cu_seqlens is None else cu_seqlens.tolist()
    longest = max(b - a for a, b in itertools.pairwise(borders))
    if block is None:
        block = min(64 if max(key_dim, value_dim) <= 64 else 128, 1 << (longest - 1).bit_length())
    if segment is None:
        room = SEGMENT_ELEMENTS.get(q.device.type, SEGMENT_ELEMENTS["cuda"])
        segment = max(1, room // (block * heads * max(key_dim, value_dim)))
    blocks = Blocks.cut(borders, block, segment, q.device)
    if state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        state = torch.zeros(len(borders) - 1, heads, key_dim, value_dim, dtype=dtype, device=q.device)
    flat = (x.reshape(batch * length, heads, -1) for x in (q, k, v))
    out, final = _Chunked.apply(*flat, rates, state, blocks)
    return out.view(batch, length, heads, value_dim), final


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the tokens of all samples are cut: each sample into blocks from its own start, blocks into segments."""

    size: int
    segment: int
    sample: list[int]  # [G] whose block it is
    first: list[bool]  # [G] whether it begins its sample
    last: list[bool]  # [G] whether it ends its sample
    lengths: Tensor  # [G] true number of tokens, 1..size
    rows: Tensor | None  # [G, C] token of each place; short blocks repeat their last one. None: places are the tokens.

    @classmethod
    def cut(cls, borders: list[int], size: int, segment: int, device: torch.device) -> "Blocks":
        starts, lengths, sample, first, last = [], [], [], [], []
        for n, (begin, end) in enumerate(itertools.pairwise(borders)):
            for start in range(begin, end, size):
                starts.append(start)
                lengths.append(min(size, end - start))
                sample.append(n)
                first.append(start == begin)
                last.append(start + size >= end)
        lengths_G = torch.tensor(lengths, device=device)
        rows = None
        if min(lengths) < size:
            places = torch.arange(size, device=device).expand(len(starts), size)
            rows = torch.tensor(starts, device=device)[:, None] + places.minimum(lengths_G[:, None] - 1)
        return cls(size=size, segment=segment, sample=sample, first=first, last=last, lengths=lengths_G, rows=rows)

    def segments(self) -> list[range]:
        return [range(g, min(g + self.segment, len(self.sample))) for g in range(0, len(self.sample), self.segment)]

    def take(self, x: Tensor, part: range) -> Tensor:
        """The tokens of some blocks out of x [tokens, H, D], as [g, H, C, D]."""
        if self.rows is None:
            picked = x[part.start * self.size : part.stop * self.size]
        else:
            picked = x.index_select(0, self.rows[part.start : part.stop].flatten())
        return picked.view(len(part), self.size, *x.shape[1:]).transpose(1, 2)

    def put(self, blocks_gHCD: Tensor, into: Tensor, part: range) -> None:
        """Write blocks back to their tokens in `into` [tokens, H, D]."""
        values = blocks_gHCD.transpose(1, 2)
        if self.rows is None:
            into[part.start * self.size : part.stop * self.size] = values.flatten(0, 1)
        else:
            real = self.real(part)
            into[self.rows[part.start : part.stop][real]] = values[real].to(into.dtype)

    def real(self, part: range) -> Tensor:
        """[g, C] bool: which places hold a token of their own."""
        return torch.arange(self.size, device=self.lengths.device) < self.lengths[part.start : part.stop, None]


class _Decays:
    """Every weight of the block form, all of them exponentials of zero or less."""

    def __init__(self, blocks: Blocks, rates: Tensor, dtype: torch.dtype):
        self.blocks, self.rates = blocks, rates.to(dtype)
        place = torch.arange(blocks.size, device=rates.device, dtype=dtype)
        age = place[:, None] - place
        # exp(-s (i - j)) for j <= i, else 0: [H, C, C]
        self.inside = torch.exp(-self.rates[:, None, None] * age.clamp(min=0)) * (age >= 0)
        # exp(-s (i + 1)): [H, C, 1]
        self.since_block_start = torch.exp(-self.rates[:, None] * (place + 1))[..., None]

    def until_block_end(self, part: range) -> Tensor:
        """exp(-s (n - 1 - j)), zero behind a short block's end: [g, H, C, 1]."""
        place = torch.arange(self.blocks.size, device=self.rates.device)
        left = self.blocks.lengths[part.start : part.stop, None] - 1 - place
        decay = torch.exp(-self.rates[:, None] * left[:, None].clamp(min=0)) * (left[:, None] >= 0)
        return decay[..., None]

    def whole_block(self, part: range) -> Tensor:
        """exp(-s n): [g, H, 1, 1]."""
        return torch.exp(-self.rates * self.blocks.lengths[part.start : part.stop, None])[..., None, None]


def _states_before(updates: Tensor, carry: Tensor, initial: Tensor, decay: Tensor, blocks: Blocks, part: range):
    """States before each block of a segment [g, H, K, V], the state after it, and the samples that end in it."""
    before, ended = torch.empty_like(updates), {}
    for i, g in enumerate(part):
        before[i] = initial[blocks.sample[g]] if blocks.first[g] else carry
        carry = torch.addcmul(updates[i], before[i], decay[i])
        if blocks.last[g]:
            ended[blocks.sample[g]] = carry
    return before, carry, ended


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial: Tensor, blocks: Blocks):
        dtype, operand = initial.dtype, q.dtype
        decays = _Decays(blocks, rates, dtype)
        inside = decays.inside.to(operand)
        out, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(initial)
        carry = torch.zeros_like(initial[0])
        carries = []
        for part in blocks.segments():
            carries.append(carry)
            b_q, b_k, b_v = (blocks.take(x, part).contiguous() for x in (q, k, v))
            updates = torch.matmul((b_k * decays.until_block_end(part)).mT, b_v.to(dtype))
            before, carry, ended = _states_before(updates, carry, initial, decays.whole_block(part), blocks, part)
            for n, state in ended.items():
                final[n] = state
            b_out = torch.matmul((b_q * decays.since_block_start).to(operand), before.to(operand))
            b_out += torch.matmul(torch.matmul(b_q, b_k.mT).mul_(inside), b_v)
            blocks.put(b_out, out, part)
        ctx.save_for_backward(q, k, v, rates, initial, torch.stack(carries))
        ctx.blocks = blocks
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_final: Tensor):
        q, k, v, rates, initial, carries = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        decays = _Decays(blocks, rates, initial.dtype)
        d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        d_initial, d_carry = torch.empty_like(initial), torch.zeros_like(initial[0])
        for part, carry in reversed(list(zip(blocks.segments(), carries, strict=True))):
            tiles = [blocks.take(x, part).contiguous() for x in (q, k, v, d_out)]
            if blocks.rows is not None:
                tiles[3] = tiles[3] * blocks.real(part)[:, None, :, None]
            grads, d_carry = _segment_backward(tiles, carry, initial, d_final, d_initial, d_carry, decays, part)
            for grad, into in zip(grads, (d_q, d_k, d_v), strict=True):
                blocks.put(grad, into, part)
        return d_q, d_k, d_v, None, d_initial, None


def _segment_backward(tiles, carry, initial, d_final, d_initial, d_carry, decays: _Decays, part: range):
    """Gradients of a segment's q, k, v [g, H, C, D] and of the state before it; fills d_initial where samples begin."""
    b_q, b_k, b_v, b_do = tiles
    dtype, operand, blocks = initial.dtype, b_q.dtype, decays.blocks
    inside, to_end, whole = decays.inside.to(operand), decays.until_block_end(part), decays.whole_block(part)

    updates = torch.matmul((b_k * to_end).mT, b_v.to(dtype))
    before, _, _ = _states_before(updates, carry, initial, whole, blocks, part)
    d_reads = torch.matmul((b_q * decays.since_block_start).mT, b_do.to(dtype))
    d_after = torch.empty_like(before)
    for i, g in reversed(list(enumerate(part))):
        d_after[i] = d_final[blocks.sample[g]] if blocks.last[g] else d_carry
        d_carry = torch.addcmul(d_reads[i], d_after[i], whole[i])
        if blocks.first[g]:
            d_initial[blocks.sample[g]] = d_carry
    before, d_after = before.to(operand), d_after.to(operand)

    scores = torch.matmul(b_q, b_k.mT).mul_(inside)
    d_scores = torch.matmul(b_do, b_v.mT).mul_(inside)
    to_end = to_end.to(operand)
    d_q = torch.matmul(d_scores, b_k) + torch.matmul(b_do, before.mT) * decays.since_block_start
    d_k = torch.matmul(d_scores.mT, b_q) + torch.matmul(b_v, d_after.mT) * to_end
    d_v = torch.matmul(scores.mT, b_do) + torch.matmul(b_k, d_after) * to_end
    return (d_q.to(operand), d_k, d_v), d_carry
