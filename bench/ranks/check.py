"""Whether ranks compute what one computes: LASP+, the ring and spread experts, outputs and gradients.

Every rank computes the whole on its own device as well, from the same random numbers, and compares its part.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.bench.gpu import relative_error
from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.lightning import decay_rates, silu_lightning_attention
from fulmen.ops.softmax import softmax_attention
from fulmen.parallel import Cut
from fulmen.parallel.experts import spread_experts_mlp
from fulmen.parallel.lasp import lasp_attention
from fulmen.parallel.ring import ring_attention
from ranks.timing import random

TOKENS = {"cpu": 1003, "cuda": 20011}
BORDERS = (0, 0.1, 0.103, 0.37, 0.9, 1)
"""Where samples end, as parts of the row: within a rank and over several, at no rank's edge."""
HEADS, KV_HEADS, WIDTH = 8, 2, 64
HIDDEN, EXPERT, EXPERTS, CHOICES = 256, 128, 16, 2


def check(device: torch.device) -> list[dict]:
    """Relative errors, the worst rank's, beside one process in the same dtype."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    rows = []
    for dtype in dtypes:
        for name, errors in _attentions(device, dtype):
            rows.append(_row(name, dtype, errors))
        for name, errors in _experts(device, dtype):
            rows.append(_row(name, dtype, errors))
    return rows


def _row(name: str, dtype: torch.dtype, errors: list[float]) -> dict:
    worst = torch.tensor([errors[0], max(errors[1:])])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    found = dict(zip(("outputs", "gradients"), worst.tolist(), strict=True))
    return {"what": name, "dtype": str(dtype).removeprefix("torch.")} | found


def _attentions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, list[float]]]:
    tokens = TOKENS[device.type]
    borders, group = tuple(int(part * tokens) for part in BORDERS), dist.group.WORLD
    ends, rates = torch.tensor(borders, dtype=torch.int32), decay_rates(HEADS, 0, 8).to(device)
    for balanced in (False, True):
        cut, how = Cut(borders, dist.get_world_size(), balanced), "balanced" if balanced else "plain"
        torch.manual_seed(1)
        qkv = random(device, 1, tokens, HEADS, 3, WIDTH, dtype=dtype)
        q, k, v = (random(device, 1, tokens, heads, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
        grad = random(device, 1, tokens, HEADS, WIDTH, dtype=dtype).detach()
        lasp = _errors(
            lambda x, ends=ends: silu_lightning_attention(x, rates, cu_seqlens=ends)[0],
            lambda x, cut=cut: lasp_attention(x, rates, cut, group),
            [qkv],
            grad,
            cut,
        )
        yield f"LASP+, {how}", lasp
        ring = _errors(
            lambda *x, ends=ends: softmax_attention(*x, ends),
            lambda *x, cut=cut: ring_attention(*x, cut, group),
            [q, k, v],
            grad,
            cut,
        )
        yield f"ring, {how}", ring


def _errors(whole: Callable, parts: Callable, inputs: list[Tensor], grad: Tensor, cut: Cut) -> list[float]:
    """Of this rank's part of the outputs, then of the gradients of each input."""
    rank = dist.get_rank()
    out = whole(*inputs)
    out.backward(grad)
    mine = [cut.take(x.detach(), rank).requires_grad_() for x in inputs]
    found = parts(*mine)
    found.backward(cut.take(grad, rank))
    pairs = [(found, out), *((m.grad, x.grad) for m, x in zip(mine, inputs, strict=True))]
    return [relative_error(one.detach(), cut.take(other.detach(), rank)) for one, other in pairs]


def _experts(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, list[float]]]:
    for name, ep, etp in expert_groups():
        for groups in (1, 4):
            yield f"{name}, groups {groups}", _errors_of_experts(device, dtype, ep, etp, groups)


def expert_groups() -> Iterator[tuple[str, dist.ProcessGroup, dist.ProcessGroup]]:
    """(name, ep, etp) of all ranks along the one, along the other, and of four and more along both."""
    world, singles = dist.get_world_size(), dist.new_subgroups(1)[0]
    yield f"ep {world}", dist.group.WORLD, singles
    yield f"etp {world}", singles, dist.group.WORLD
    if world >= 4:
        both = dist.device_mesh.init_device_mesh(_device_type(), (2, world // 2), mesh_dim_names=("etp", "ep"))
        yield f"ep {world // 2} x etp 2", both.get_group("ep"), both.get_group("etp")


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _errors_of_experts(
    device: torch.device, dtype: torch.dtype, ep: dist.ProcessGroup, etp: dist.ProcessGroup, groups: int
) -> list[float]:
    """Each rank has its part of the tokens; the last one has twice as many as the others."""
    torch.manual_seed(2)
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens, share = TOKENS[device.type] // (world + 1) * (world + 1), TOKENS[device.type] // (world + 1)
    mine = slice(rank * share, tokens if rank == world - 1 else (rank + 1) * share)
    x = random(device, tokens, HIDDEN, dtype=dtype)
    w13 = random(device, EXPERTS, 2 * EXPERT, HIDDEN, dtype=dtype)
    w2 = random(device, EXPERTS, HIDDEN, EXPERT, dtype=dtype)
    logits = torch.randn(tokens, EXPERTS, device=device)
    grad = random(device, tokens, HIDDEN, dtype=dtype).detach()
    out = experts_mlp(x, w13, w2, route(logits, CHOICES))
    out.backward(grad)
    part_x = x.detach()[mine].requires_grad_()
    part_w13 = _part(w13.detach().unflatten(1, (2, -1)), ep, etp, 2).flatten(1, 2).requires_grad_()
    part_w2 = _part(w2.detach(), ep, etp, 2).requires_grad_()
    routing = route(logits[mine], CHOICES)
    found = spread_experts_mlp(part_x, part_w13, part_w2, routing, ep=ep, etp=etp, groups=groups)
    found.backward(grad[mine])
    return [
        relative_error(found.detach(), out.detach()[mine]),
        relative_error(part_x.grad, x.grad[mine]),
        relative_error(part_w13.grad, _part(w13.grad.unflatten(1, (2, -1)), ep, etp, 2).flatten(1, 2)),
        relative_error(part_w2.grad, _part(w2.grad, ep, etp, 2)),
    ]


def _part(weight: Tensor, ep: dist.ProcessGroup, etp: dist.ProcessGroup, width_dim: int) -> Tensor:
    """This rank's experts and its part of their width."""
    return weight.chunk(ep.size())[ep.rank()].chunk(etp.size(), width_dim)[etp.rank()].contiguous()
