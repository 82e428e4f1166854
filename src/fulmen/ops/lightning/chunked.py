"""Lightning attention by blocks: matrix products on any device, with a backward that keeps no block states.

Letters: N samples, G blocks of at most C tokens, H heads, K and V the widths of keys and values. README.md beside this
file derives the formulas.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.cpu import training
from fulmen.ops.lightning.context import Context
from fulmen.ops.packing import sample_borders

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
    batch, length, heads, _ = q.shape
    borders = sample_borders(batch, length, cu_seqlens)
    flat = [x.reshape(batch * length, heads, -1) for x in (q, k, v)]
    blocks = _cut(flat[0], flat[2], borders, block, segment)
    if state is None:
        state = _zero_states(flat[0], flat[2], len(borders) - 1)
    # Autocast would take the states' products, which are in fp32 on purpose, down to bf16.
    with torch.autocast(q.device.type, enabled=False):
        out, final = _Chunked.apply(*flat, rates, state, blocks)
    return out.view(batch, length, heads, -1), final


def forward_pass(qkv: Tensor, rates: Tensor, borders: Sequence[int]) -> tuple[Tensor, Context, tuple[Tensor, ...]]:
    """See `fulmen.ops.lightning.parts.forward_pass`."""
    q, k, v = qkv.unbind(2)
    context, initial = Context(), _zero_states(q, v, len(borders) - 1)
    with torch.autocast(q.device.type, enabled=False):
        out, _ = _Chunked.forward(context, q, k, v, rates, initial, _cut(q, v, list(borders)))
    return out, context, context.take_saved()[3:]


def backward_pass(d_out: Tensor, qkv: Tensor, context: Context, kept: tuple[Tensor, ...]) -> Tensor:
    """See `fulmen.ops.lightning.parts.backward_pass`."""
    context.save_for_backward(*qkv.unbind(2), *kept)
    d_q, d_k, d_v, *_ = _Chunked.backward(context, d_out, torch.zeros_like(kept[1]))
    return torch.stack([d_q, d_k, d_v], dim=2)


def _cut(q: Tensor, v: Tensor, borders: list[int], block: int | None = None, segment: int | None = None) -> "Blocks":
    """The blocks of q [tokens, H, K] and v [tokens, H, V], of sizes that suit the device where none are given."""
    heads, width = q.shape[1], max(q.shape[2], v.shape[2])
    if block is None:
        longest = max(b - a for a, b in itertools.pairwise(borders))
        block = min(64 if width <= 64 else 128, 1 << (longest - 1).bit_length())
    if segment is None:
        room = SEGMENT_ELEMENTS.get(q.device.type, SEGMENT_ELEMENTS["cuda"])
        segment = max(1, room // (block * heads * width))
    return Blocks.cut(borders, block, segment, q.device)


def _zero_states(q: Tensor, v: Tensor, samples: int) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros(samples, q.shape[1], q.shape[2], v.shape[2], dtype=dtype, device=q.device)


class Piece(NamedTuple):
    """The part of one sample that lies in one segment: `blocks` of the segment's."""

    sample: int
    blocks: slice
    times: Tensor  # [blocks + 1] tokens from the piece's begin to each block's begin, and to the piece's end


class Segment(NamedTuple):
    """Consecutive blocks that are computed together: g blocks of m pieces."""

    blocks: slice
    pieces: list[Piece]
    starts: Tensor  # [m + 1] int64, on the CPU: the block, counted in the segment, that each piece begins with, and g
    continues: bool  # the first piece's sample began in an earlier segment
    goes_on: bool  # the last piece's sample does not end here

    @property
    def samples(self) -> slice:
        return slice(self.pieces[0].sample, self.pieces[-1].sample + 1)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the tokens of all samples are cut: each sample into blocks from its own start, blocks into segments."""

    size: int
    lengths: Tensor  # [G] true number of tokens of each block, 1..size
    rows: Tensor | None  # [G, C] token of each place; short blocks repeat their last one. None: places are the tokens.
    segments: list[Segment]

    @classmethod
    def cut(cls, borders: list[int], size: int, segment: int, device: torch.device) -> "Blocks":
        """Blocks of `size` tokens, `segment` of them at a time."""
        samples = list(enumerate(itertools.pairwise(borders)))
        cuts = [(n, a, min(a + size, end)) for n, (begin, end) in samples for a in range(begin, end, size)]
        segments = [
            _segment(borders, cuts, g, min(g + segment, len(cuts)), device) for g in range(0, len(cuts), segment)
        ]
        starts = torch.tensor([start for _, start, _ in cuts], device=device)
        lengths = torch.tensor([end - start for _, start, end in cuts], device=device)
        rows = None
        if any(end - start < size for _, start, end in cuts):
            rows = starts[:, None] + torch.arange(size, device=device).minimum(lengths[:, None] - 1)
        return cls(size=size, lengths=lengths, rows=rows, segments=segments)

    def take(self, x: Tensor, part: slice) -> Tensor:
        """The tokens of some blocks out of x [tokens, H, D], as [g, H, C, D]."""
        if self.rows is None:
            picked = x[part.start * self.size : part.stop * self.size]
        else:
            picked = x.index_select(0, self.rows[part].flatten())
        return picked.unflatten(0, (-1, self.size)).transpose(1, 2).contiguous()

    def put(self, blocks_gHCD: Tensor, into: Tensor, part: slice) -> None:
        """Write blocks back to their tokens in `into` [tokens, H, D]."""
        values = blocks_gHCD.transpose(1, 2)
        if self.rows is None:
            into[part.start * self.size : part.stop * self.size].unflatten(0, (-1, self.size)).copy_(values)
        else:
            real = self.real(part)
            into[self.rows[part][real]] = values[real].to(into.dtype)

    def real(self, part: slice) -> Tensor:
        """[g, C] bool: which places hold a token of their own."""
        return torch.arange(self.size, device=self.lengths.device) < self.lengths[part, None]


def _segment(borders: list[int], cuts: list[tuple[int, int, int]], first: int, stop: int, device) -> Segment:
    """The segment of blocks first..stop-1 out of `cuts`, each a block's (sample, start, end)."""
    pieces, place = [], 0
    for sample, group in itertools.groupby(cuts[first:stop], key=lambda cut: cut[0]):
        group = list(group)
        times = [start - group[0][1] for _, start, _ in group] + [group[-1][2] - group[0][1]]
        pieces.append(Piece(sample, slice(place, place + len(group)), torch.tensor(times, device=device)))
        place += len(group)
    return Segment(
        blocks=slice(first, stop),
        pieces=pieces,
        starts=torch.tensor([piece.blocks.start for piece in pieces] + [place], device="cpu"),
        continues=cuts[first][1] != borders[pieces[0].sample],
        goes_on=cuts[stop - 1][2] != borders[pieces[-1].sample + 1],
    )


class _Decays:
    """Every weight of the block form, all of them exponentials of zero or less."""

    def __init__(self, blocks: Blocks, rates: Tensor, dtype: torch.dtype):
        self.blocks, self.rates = blocks, rates.to(dtype)
        self.place = torch.arange(blocks.size, device=rates.device)
        # exp(-s (i - j)) for j <= i, else 0: [H, C, C]
        self.inside = self._of(self.place[:, None] - self.place)
        # exp(-s (i + 1)): [H, C, 1]
        self.since_block_start = self._of(self.place + 1)[..., None]

    def until_block_end(self, part: slice) -> Tensor:
        """exp(-s (n - 1 - j)), zero behind a short block's end: [g, H, C, 1]."""
        return self._of(self.blocks.lengths[part, None] - 1 - self.place).transpose(0, 1)[..., None]

    def across(self, part: slice) -> Tensor:
        """exp(-s n), what of a state is left after each block: [g, H]."""
        return self._of(self.blocks.lengths[part]).T.contiguous()

    def between(self, piece: Piece) -> Tensor:
        """exp(-s (t_i - t_j)) for j <= i, over the times of a piece: [H, blocks + 1, blocks + 1].

        What of each inflow (the state that enters the piece, then each block's update) is left at each time.
        """
        return self._of(piece.times[:, None] - piece.times)

    def _of(self, distance: Tensor) -> Tensor:
        """exp(-s distance) for every head, [H, ...]; zero where the distance is negative."""
        rates = self.rates.view(-1, *[1] * distance.dim())
        return torch.exp(-rates * distance.clamp(min=0)) * (distance >= 0)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial: Tensor, blocks: Blocks):
        decays = _Decays(blocks, rates, initial.dtype)
        inside = decays.inside.to(q.dtype)
        out, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(initial)
        carry, carries = torch.zeros_like(initial[0]), []
        for segment in blocks.segments:
            part = segment.blocks
            carries.append(carry)
            b_q, b_k, b_v = (blocks.take(x, part) for x in (q, k, v))
            before, ending = _states(b_k, b_v, carry, initial, decays, segment)
            carry = ending[-1]
            final[segment.samples] = ending
            b_out = torch.matmul((b_q * decays.since_block_start).to(q.dtype), before)
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
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        d_initial, d_carry = torch.empty_like(initial), torch.zeros_like(initial[0])
        for segment, carry in reversed(list(zip(blocks.segments, carries, strict=True))):
            part = segment.blocks
            tiles = [blocks.take(x, part) for x in (q, k, v, d_out)]
            if blocks.rows is not None:
                tiles[3] = tiles[3] * blocks.real(part)[:, None, :, None]
            d_ending = _replaced(d_final[segment.samples], -1, d_carry if segment.goes_on else None)
            with torch.autocast(q.device.type, enabled=False):
                d_tiles, d_entering = _segment_backward(tiles, carry, initial, d_ending, decays, segment)
            d_carry = d_entering[0]
            # What flows into a sample that began earlier is for the segment before to hand on: it overwrites this.
            d_initial[segment.samples] = d_entering
            for d_tile, grad in zip(d_tiles, grads, strict=True):
                blocks.put(d_tile, grad, part)
        return *grads, None, d_initial, None


def _states(
    b_k: Tensor, b_v: Tensor, carry: Tensor, initial: Tensor, decays: _Decays, segment: Segment
) -> tuple[Tensor, Tensor]:
    """States before each block of a segment [g, H, K, V], in the operands' dtype, and at the end of each piece."""
    entering = _replaced(initial[segment.samples], 0, carry if segment.continues else None)
    updates = torch.matmul((b_k * decays.until_block_end(segment.blocks)).to(b_k.dtype).mT, b_v)
    if training.fuses(updates, entering):
        return training.scan_states(updates, entering, decays.across(segment.blocks), segment.starts)
    before, ending = torch.empty_like(updates), torch.empty_like(entering)
    for n, piece in enumerate(segment.pieces):
        states = _weighted(decays.between(piece), entering[n : n + 1], updates[piece.blocks].to(entering.dtype))
        before[piece.blocks], ending[n] = states[:-1], states[-1]
    return before, ending


def _d_states(d_before: Tensor, d_ending: Tensor, decays: _Decays, segment: Segment) -> tuple[Tensor, Tensor]:
    """The same backward: gradients of the updates, like `d_before`, and of the entering states [m, H, K, V]."""
    if training.fuses(d_before, d_ending):
        return training.scan_states(d_before, d_ending, decays.across(segment.blocks), segment.starts, backwards=True)
    d_updates, d_entering = torch.empty_like(d_before), torch.empty_like(d_ending)
    for n, piece in enumerate(segment.pieces):
        weights, parts = decays.between(piece).mT, (d_before[piece.blocks].to(d_ending.dtype), d_ending[n : n + 1])
        d_inflows = _weighted(weights, *parts)
        d_entering[n], d_updates[piece.blocks] = d_inflows[0], d_inflows[1:]
    return d_updates, d_entering


def _weighted(weights: Tensor, *parts: Tensor) -> Tensor:
    """weights [H, a, b] times the parts [b in all, H, K, V], per head: [a, H, K, V]."""
    rows = torch.cat(parts).flatten(2).transpose(0, 1)
    return torch.matmul(weights, rows).transpose(0, 1).unflatten(2, parts[0].shape[2:])


def _replaced(rows: Tensor, index: int, row: Tensor | None) -> Tensor:
    """`rows` with one of them exchanged, unless `row` is None."""
    if row is None:
        return rows
    rows = rows.clone()
    rows[index] = row
    return rows


def _segment_backward(
    tiles: list[Tensor], carry: Tensor, initial: Tensor, d_ending: Tensor, decays: _Decays, segment: Segment
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of a segment's q, k, v [g, H, C, D], and of the states that enter its pieces [m, H, K, V]."""
    b_q, b_k, b_v, b_do = tiles
    operand = b_q.dtype
    inside, to_end = decays.inside.to(operand), decays.until_block_end(segment.blocks).to(operand)
    since_start = decays.since_block_start

    before, _ = _states(b_k, b_v, carry, initial, decays, segment)
    d_before = torch.matmul((b_q * since_start).to(operand).mT, b_do)
    d_updates, d_entering = _d_states(d_before, d_ending, decays, segment)

    scores = torch.matmul(b_q, b_k.mT).mul_(inside)
    d_scores = torch.matmul(b_do, b_v.mT).mul_(inside)
    d_q = torch.matmul(d_scores, b_k) + torch.matmul(b_do, before.mT).mul_(since_start.to(operand))
    d_k = torch.matmul(d_scores.mT, b_q) + torch.matmul(b_v, d_updates.mT).mul_(to_end)
    d_v = torch.matmul(scores.mT, b_do) + torch.matmul(b_k, d_updates).mul_(to_end)
    return (d_q, d_k, d_v), d_entering
