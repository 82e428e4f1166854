"""LASP+ over ranks against lightning attention of the whole row on one."""

import itertools
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks

from fulmen.ops.lightning import decay_rates, silu_lightning_attention
from fulmen.parallel import Cut, lasp
from fulmen.parallel.lasp import lasp_attention, serial_lasp_attention

HEADS, WIDTH = 3, 8


def random_borders(length, seed):
    """Samples of any lengths, some of one token, some over several ranks."""
    random = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, 7, (1,), generator=random))
    inner = torch.randperm(length - 1, generator=random)[:count].add(1).sort().values.tolist()
    return (0, *inner, length)


# Ending exactly at a rank's edge, one sample over all, one a token, ...
BORDERS = [(0, 37), (0, 16, 32), (0, 1, 2, 40, 41), (0, 8, 12, 24), (0, 3), *(random_borders(41, n) for n in range(6))]


def whole_row(borders):
    torch.manual_seed(borders[-1])
    qkv = torch.randn(1, borders[-1], HEADS, 3, WIDTH, requires_grad=True)
    grad = torch.randn(1, borders[-1], HEADS, WIDTH)
    return qkv, decay_rates(HEADS, 1, 4), grad


def on_a_rank(cases):
    """Outputs and gradients of this rank's part of each (borders, balanced)."""
    found = []
    for borders, balanced in cases:
        cut, rank = Cut(borders, dist.get_world_size(), balanced), dist.get_rank()
        qkv, rates, grad = whole_row(borders)
        mine = cut.take(qkv.detach(), rank).requires_grad_()
        out = lasp_attention(mine, rates, cut, dist.group.WORLD)
        out.backward(cut.take(grad, rank))
        found.append((out.detach(), mine.grad))
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_outputs_and_gradients_are_those_of_the_whole_row(world):
    cases = list(itertools.product(BORDERS, (False, True)))
    for (borders, balanced), *parts in zip(cases, *run_ranks(world, on_a_rank, cases), strict=True):
        qkv, rates, grad = whole_row(borders)
        out, _ = silu_lightning_attention(qkv, rates, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
        out.backward(grad)
        cut = Cut(borders, world, balanced)
        for expected, found in ((out, [o for o, _ in parts]), (qkv.grad, [g for _, g in parts])):
            torch.testing.assert_close(cut.join(found), expected.detach(), rtol=1e-5, atol=1e-5, msg=str(borders))


def serial(borders):
    cut, rank = Cut(borders, dist.get_world_size()), dist.get_rank()
    qkv, rates, _ = whole_row(borders)
    with torch.no_grad():
        return serial_lasp_attention(cut.take(qkv, rank), rates, cut, dist.group.WORLD)


def test_the_serial_form_gives_the_same():
    borders = (0, 5, 33, 40)
    qkv, rates, _ = whole_row(borders)
    expected, _ = silu_lightning_attention(qkv, rates, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    found = Cut(borders, 4).join(run_ranks(4, serial, borders))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def order_of_work():
    """What this rank does, forward and backward, where a sample crosses its edges."""
    log = []

    def noted(name, function):
        return lambda *arguments: log.append(name) or function(*arguments)

    with ExitStack() as patches:
        for owner, name, said in (
            (lasp._Crossing, "start", "launch"),
            (lasp, "forward_pass", "inside"),
            (lasp, "backward_pass", "inside"),
            (lasp._Crossing, "_fold", "wait"),
        ):
            patches.enter_context(mock.patch.object(owner, name, noted(said, getattr(owner, name))))
        cut, rank = Cut((0, 24), dist.get_world_size()), dist.get_rank()
        qkv, rates, grad = whole_row((0, 24))
        lasp_attention(cut.take(qkv, rank), rates, cut, dist.group.WORLD).backward(cut.take(grad, rank))
    return log


def test_states_travel_while_what_is_inside_is_computed():
    for log in run_ranks(3, order_of_work):
        assert log == ["launch", "inside", "wait"] * 2


def folded_under_autocast():
    """The dtypes of the states that are sent and folded, forward and backward, and of the gradient."""
    dtypes, fold = [], lasp._Crossing._fold

    def noted(crossing, weights):
        sent = crossing._mine.dtype
        dtypes.append((sent, (folded := fold(crossing, weights)).dtype))
        return folded

    with mock.patch.object(lasp._Crossing, "_fold", noted), torch.autocast("cpu", torch.bfloat16):
        cut, rank = Cut((0, 24), dist.get_world_size()), dist.get_rank()
        qkv, rates, grad = whole_row((0, 24))
        mine = cut.take(qkv.detach().bfloat16(), rank).requires_grad_()
        lasp_attention(mine, rates, cut, dist.group.WORLD).backward(cut.take(grad, rank).bfloat16())
    return dtypes, mine.grad.dtype


def test_states_stay_in_fp32_under_autocast():
    for dtypes, grad in run_ranks(2, folded_under_autocast):
        assert dtypes == [(torch.float32, torch.float32)] * 2
        assert grad == torch.bfloat16
