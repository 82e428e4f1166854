"""Launches every Triton kernel of the package on small inputs, for compute-sanitizer to watch. pytest does not run it.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/sanitize.py

Without PyTorch's cache each tensor is an allocation of its own, so that an access beside it shows. Where there is no
GPU, `TRITON_INTERPRET=1 python tests/sanitize.py` tells whether this program itself is right. It fails where a result
is not finite, and where a kernel was never launched: a new kernel needs a function in `CHECKS`.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch
import triton
from torch import Tensor

from fulmen.ops import gpu
from fulmen.ops.experts import balance_loss, experts_mlp, route
from fulmen.ops.lightning import decay_rates, lightning_attention, silu_lightning_attention
from fulmen.ops.lightning.triton import candidates, triton_lightning_attention
from fulmen.ops.loss import IGNORE, linear_cross_entropy
from fulmen.ops.norm import add_rms_norm, rms_norm
from fulmen.ops.rotary import apply_rotary, rotary_frequencies, rotary_tables
from fulmen.ops.swiglu import swiglu, swiglu_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = ["fulmen.ops.lightning.triton", *(f"{gpu.__name__}.{name}" for name in gpu.MODULES)]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def both_ways(function: Callable, *tensors: Tensor) -> list[Tensor]:
    """What the function makes of these tensors, and the gradients of all of them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    outs = [out] if isinstance(out, Tensor) else [x for x in out if x.requires_grad]
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.randn_like(x) for x in outs])]


def lightning(dtype: torch.dtype) -> Iterable[Tensor]:
    """Packed borders of which no length fits a block, states before the first token; with and without gradients."""
    borders, rates = torch.tensor([0, 1, 70, 133], dtype=torch.int32), decay_rates(3, 1, 4).to(DEVICE)
    inputs = [randn(1, 133, 3, width, dtype=dtype) for width in (64, 64, 96)]
    state, options = randn(3, 3, 64, 96), {"cu_seqlens": borders, "return_state": True, "backend": "triton"}
    yield from both_ways(lambda *x: lightning_attention(*x[:3], rates, state=x[3], **options), *inputs, state)
    with torch.no_grad():
        yield from lightning_attention(*inputs, rates, return_state=True, backend="triton")


def lightning_silu(dtype: torch.dtype) -> Iterable[Tensor]:
    rates, qkv = decay_rates(2, 1, 4).to(DEVICE), randn(2, 70, 2, 3, 32, dtype=dtype)
    yield from both_ways(lambda x: silu_lightning_attention(x, rates, return_state=True), qkv)


def lightning_tilings(dtype: torch.dtype) -> Iterable[Tensor]:
    """Each tiling that a GPU may take, samples whole and cut into segments."""
    borders, rates = torch.tensor([0, 5, 170, 200], dtype=torch.int32), decay_rates(2, 1, 4).to(DEVICE)
    inputs = [*(randn(1, 200, 2, 128, dtype=dtype) for _ in range(3)), randn(3, 2, 128, 128)]
    for tiling in candidates(dtype, 128, 128).values():
        for segment in (1000, 75):
            attend = partial(triton_lightning_attention, cu_seqlens=borders, tiling=tiling, segment=segment)
            yield from both_ways(lambda *x, attend=attend: attend(*x[:3], rates, x[3]), *inputs)


def lightning_step(dtype: torch.dtype) -> Iterable[Tensor]:
    """The next token of sequences in slots of a pool, of which one pads the batch."""
    q, k, v = randn(4, 3, 3 * 40, dtype=dtype).split(40, dim=-1)
    pool, rates = randn(5, 3, 40, 40), decay_rates(3, 1, 4).to(DEVICE)
    for silu in (False, True):
        yield gpu.decoding.lightning_step_(q, k, v, rates, pool, int32(4, -1, 0, 2), silu=silu)
    yield pool


def attention_step(dtype: torch.dtype) -> Iterable[Tensor]:
    """Keys in one program and in several, at the first and at the last position."""
    frequencies = rotary_frequencies(24, 1e4, DEVICE)
    for room in (8, 300):
        q, k, v = (randn(4, heads, 40, dtype=dtype) for heads in (6, 2, 2))
        keys, values = randn(2, 5, room, 2, 40, dtype=dtype)
        place = (frequencies, keys, values, int32(4, -1, 0, 2), int32(0, 0, room - 1, room // 2))
        gpu.decoding.append_keys_(k, v, *place)
        yield from (keys, values, gpu.decoding.attention_step(q, *place))


def paged_attention_step(dtype: torch.dtype) -> Iterable[Tensor]:
    """The pages of each sequence's tokens, the last of which may not be full."""
    q, k, v = (randn(3, heads, 40, dtype=dtype) for heads in (6, 2, 2))
    keys, values = randn(2, 7, 16, 2, 40, dtype=dtype)
    pages = gpu.decoding.Tables(int32(0, 0, 4), int32(6, 1, 0, 3, 5))
    place = (rotary_frequencies(24, 1e4, DEVICE), keys, values, int32(4, -1, 0), int32(50, 0, 15), pages)
    gpu.decoding.append_keys_(k, v, *place)
    yield from (keys, values, gpu.decoding.attention_step(q, *place, longest=300))


def experts_step(dtype: torch.dtype) -> Iterable[Tensor]:
    w13, w2 = randn(5, 2 * 40, 136, dtype=dtype), randn(5, 136, 40, dtype=dtype)
    for tokens in (1, 7):
        choices = route(randn(tokens, 5), 2)
        yield gpu.decoding.experts_mlp(randn(tokens, 136, dtype=dtype), w13, w2, choices.experts)


def add_norm_step(dtype: torch.dtype) -> Iterable[Tensor]:
    """One branch or the weighted sum of an expert's answers, with and without the router that may follow."""
    normed, answers, weight = randn(5, 136, dtype=dtype), randn(5, 3, 136, dtype=dtype), randn(136, dtype=dtype)
    router = gpu.decoding.Router(randn(6, 136, dtype=dtype), *route(randn(5, 6), 3)[:3])
    yield gpu.decoding.add_norm(normed, answers, 1.7, 0.6, weight, 1e-5, mix=randn(5, 3))
    yield gpu.decoding.add_norm(normed, answers[:, 0].contiguous(), 1.7, 0.6, weight, 1e-5, router=router)
    yield from router


def experts(dtype: torch.dtype) -> Iterable[Tensor]:
    """Routing, sorting, permutation and back, with drops and without; more choices than one block of the sort has."""

    def function(capacity: int | None, x: Tensor, w13: Tensor, w2: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        routing = route(logits, 2, capacity)
        return experts_mlp(x, w13, w2, routing), balance_loss(routing)

    shapes = ((150, 40), (5, 2 * 24, 40), (5, 40, 24))
    tensors = [*(randn(*shape, dtype=dtype) for shape in shapes), randn(150, 5)]
    for capacity in (None, 17):
        yield from both_ways(partial(function, capacity), *tensors)


def norm(dtype: torch.dtype) -> Iterable[Tensor]:
    x, other, weight = randn(3, 5, 136, dtype=dtype), randn(3, 5, 136, dtype=dtype), randn(136)
    yield from both_ways(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight)
    yield from both_ways(lambda x, weight, gate: rms_norm(x, weight, 1e-5, gate), x, weight, other)
    yield from both_ways(lambda x, branch, weight: add_rms_norm(x, branch, 1.7, 0.6, weight, 1e-5), x, other, weight)


def gated(dtype: torch.dtype) -> Iterable[Tensor]:
    for size in (24, 1100):
        gate_up, d_act = randn(5, 2 * size, dtype=dtype), randn(5, size, dtype=dtype)
        yield swiglu(gate_up)
        yield from swiglu_backward(d_act, gate_up, randn(5, 1, dtype=dtype))


def rotary(dtype: torch.dtype) -> Iterable[Tensor]:
    for rows in (1, 2):
        tables = rotary_tables(torch.randint(5000, (rows, 7), device=DEVICE), 24, 1e4)
        yield from both_ways(lambda x, tables=tables: apply_rotary(x, *tables), randn(2, 7, 3, 40, dtype=dtype))


def loss(dtype: torch.dtype) -> Iterable[Tensor]:
    targets = torch.randint(5000, (11,), device=DEVICE)
    targets[3] = IGNORE
    function = partial(linear_cross_entropy, targets=targets, chunk=4)
    yield from both_ways(function, randn(11, 16, dtype=dtype), randn(5000, 16, dtype=dtype))


CHECKS = (
    lightning, lightning_silu, lightning_tilings, lightning_step, attention_step, paged_attention_step, experts_step,
    add_norm_step, experts, norm, gated, rotary, loss,
)  # fmt: skip


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def count_launches() -> dict[str, Counted]:
    """All kernels of the package by name, each replaced in its module by one that counts."""
    kernels = {}
    for module in map(importlib.import_module, MODULES):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels[f"{module.__name__}.{name}"] = counted = Counted(getattr(module, name))
            setattr(module, name, counted)
    return kernels


def serve_on_a_cpu() -> None:
    """The operations take the kernels for a CPU's tensors too, which the interpreter runs."""
    gpu.serves = lambda *tensors: all(x.dtype in gpu.DTYPES for x in tensors)


def main() -> int:
    if DEVICE == "cpu":
        if not triton.knobs.runtime.interpret:
            print("there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU", file=sys.stderr)
            return 2
        serve_on_a_cpu()
    torch.manual_seed(0)
    kernels, failures = count_launches(), []
    for check in CHECKS:
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{check.__name__} {dtype}"
            numbers = [x for x in check(dtype) if x.is_floating_point()]
            wrong = sum(not bool(x.isfinite().all()) for x in numbers)  # waits for the kernels
            print(f"{label}: {len(numbers)} tensors" + (f", {wrong} of them NOT FINITE" if wrong else ""), flush=True)
            failures += [label] * (wrong > 0)
    for name, kernel in kernels.items():
        print(f"{name}: {kernel.launches} launches" if kernel.launches else f"{name}: NEVER LAUNCHED")
        failures += [name] * (kernel.launches == 0)
    print("FAILED: " + ", ".join(failures) if failures else "all kernels ran, all results are finite")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
