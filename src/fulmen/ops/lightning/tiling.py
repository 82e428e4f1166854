"""How a launch of the lightning kernel is cut, and which way of several is the fastest here."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fulmen.ops.gpu import tuning

WORTH_A_TRIAL = 2**16
"""Tokens times heads from which tilings are timed: fewer take an H100 less than 30 us, and launching decides."""

MOST_TOKENS, MOST_SAMPLES = 2**16, 2**6
"""Of a question about tilings: with more tokens programs only walk longer, with more samples only more of them wait."""


class Tiling(NamedTuple):
    """How one launch is cut: results depend on it by rounding alone."""

    block: int  # C, tokens of a block
    columns: int  # of c and the state, per program
    warps: int
    stages: int  # blocks in flight


def candidates(dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, Tiling]:
    """The tilings of which any may be fastest, by name."""
    if dtype == torch.float32:
        return {"narrow": Tiling(block=32, columns=32, warps=4, stages=1)}
    if max(key_dim, value_dim) > 128:
        return {"narrow": Tiling(block=64, columns=32, warps=4, stages=2)}
    return {
        "wide": Tiling(block=64, columns=64, warps=4, stages=3),
        "narrow": Tiling(block=64, columns=32, warps=4, stages=3),
        "shallow": Tiling(block=64, columns=64, warps=4, stages=2),
    }


@functools.cache
def default_tiling(dtype: torch.dtype, key_dim: int, value_dim: int, walks: int, processors: int) -> Tiling:
    """What is taken where nothing is timed; `walks` are heads times samples.

    Narrow programs are slower, but more: right where they fill the GPU with whole samples and wide ones do not.
    """
    tilings = candidates(dtype, key_dim, value_dim)
    first, narrow = next(iter(tilings.values())), tilings["narrow"]
    fills = {tiling: fill(walks * triton.cdiv(value_dim, tiling.columns), processors) for tiling in (first, narrow)}
    return narrow if fills[narrow] and not fills[first] else first


def choose_tiling(
    x: Tensor, values: int, samples: int, wants_gradients: bool, seconds: Callable[[Tiling], float]
) -> Tiling:
    """For x [T, H, ..., K], the first of the inputs; `seconds` times a tiling on them."""
    tokens, heads, keys = len(x), x.shape[1], x.shape[-1]
    default = default_tiling(x.dtype, keys, values, heads * samples, processors_of(x.device))
    if not is_worth_a_trial(x, tokens * heads):
        return default
    tilings = candidates(x.dtype, keys, values)
    if len(tilings) == 1:
        return default
    rounded = (_rounded(tokens, MOST_TOKENS), _rounded(samples, MOST_SAMPLES))
    question = f"{x.dtype} K={keys} V={values} heads={heads} tokens={rounded[0]} samples={rounded[1]}"
    question += " forward and backward" if wants_gradients else " forward"
    # Nobody can time while launches are only recorded. What is taken then holds for the runs beside the graph too.
    seconds = None if torch.cuda.is_current_stream_capturing() else seconds
    default_first = dict(sorted(tilings.items(), key=lambda item: item[1] != default))
    return tuning.choose(question, default_first, seconds, book=_book(x.device))


@functools.cache
def _book(device: torch.device) -> str:
    return tuning.book_name(torch.cuda.get_device_name(device), Path(__file__).with_name("triton.py"))


def is_worth_a_trial(x: Tensor, size: int) -> bool:
    """Whether tilings are timed on x, of so many tokens times heads."""
    return x.is_cuda and size >= WORTH_A_TRIAL and not torch.compiler.is_compiling()


def _rounded(number: int, most: int) -> int:
    """Down to a power of two, so that there are few questions."""
    return min(most, 1 << (number.bit_length() - 1))


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fill(programs: int, processors: int) -> bool:
    """Whether so many programs keep the GPU busy: measured, two for three multiprocessors do."""
    return 3 * programs >= 2 * processors
