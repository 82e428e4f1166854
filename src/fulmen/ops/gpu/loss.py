"""Cross-entropy of rows of logits, whose place its gradient takes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Columns at a time."""


def cross_entropy_(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """-log softmax(logits)[target] per row, [T] fp32; the contiguous logits [T, V] become its gradient by them.

    A row whose target is `ignore` counts nothing. Where a target is no column at all the row's loss is nan: to raise an
    error the host would have to wait.
    """
    rows, size = logits.shape
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    width = min(WIDTH, triton.next_power_of_2(size))
    _cross_entropy_kernel[(rows,)](
        logits, targets.contiguous(), nll, size, ignore, WIDTH=width, num_warps=min(16, max(1, width // 256))
    )
    return nll


@triton.jit
def _cross_entropy_kernel(p_logits, p_targets, p_nll, size, ignore, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + row)
    p_row, i = p_logits + row * size, tl.arange(0, WIDTH)
    counts = target != ignore
    is_column = (target >= 0) & (target < size)
    at_target = tl.load(p_row + target, mask=is_column, other=float("nan")).to(tl.float32)
    highest = tl.full((WIDTH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, size, WIDTH):
        x = tl.load(p_row + start + i, mask=start + i < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        seen = (higher > float("-inf")) | (x != x)  # the maximum passes a nan over, the sum must not
        total = tl.where(seen, total * tl.exp(highest - higher) + tl.exp(x - higher), total)
        highest = higher
    top = tl.max(highest)
    some = (highest > float("-inf")) | (total != total)
    total = tl.sum(tl.where(some, total * tl.exp(highest - top), 0.0))
    tl.store(p_nll + row, tl.where(counts, (top - at_target) + tl.log(total), 0.0))
    share = tl.where(counts, 1.0 / total, 0.0)
    for start in range(0, size, WIDTH):
        column = start + i
        ok = column < size
        x = tl.load(p_row + column, mask=ok, other=0.0).to(tl.float32)
        d_x = tl.exp(x - top) * share - tl.where((column == target) & counts, 1.0, 0.0)
        tl.store(p_row + column, tl.where(counts, d_x, 0.0).to(p_row.dtype.element_ty), mask=ok)
