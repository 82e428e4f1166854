"""Ring attention over ranks against softmax attention of the whole row on one."""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from tests.parallel.test_lasp import BORDERS

from fulmen.ops.softmax import softmax_attention
from fulmen.parallel import Cut, ring
from fulmen.parallel.ring import ring_attention

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def whole_row(borders, dtype=torch.float32):
    torch.manual_seed(borders[-1])
    shapes = [(1, borders[-1], heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def on_a_rank(cases, dtype=torch.float32):
    """Outputs and gradients of this rank's part of each (borders, balanced, overlap, steps ahead)."""
    found = []
    for borders, balanced, overlap, ahead in cases:
        cut, rank = Cut(borders, dist.get_world_size(), balanced), dist.get_rank()
        q, k, v, grad = (cut.take(x, rank) for x in whole_row(borders, dtype))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        with mock.patch.object(ring, "steps_ahead", lambda step_bytes, ahead=ahead: ahead):
            out = ring_attention(*inputs, cut, dist.group.WORLD, overlap=overlap)
            out.backward(grad)
        found.append((out.detach(), *(x.grad for x in inputs)))
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_outputs_and_gradients_are_those_of_the_whole_row(world):
    cases = [*itertools.product(BORDERS, (False, True), (True,), (world,)), (BORDERS[0], False, False, world)]
    cases += [(borders, True, True, ahead) for borders in (BORDERS[0], *BORDERS[5:8]) for ahead in (1, 2)]
    check(world, cases, torch.float32, 1e-5)


def test_float64():
    check(4, [(BORDERS[0], True, True, 4), (BORDERS[2], False, True, 4)], torch.float64, 1e-13)


def check(world, cases, dtype, tolerance):
    """All ranks' parts beside the whole row."""
    for (borders, balanced, *_), *parts in zip(cases, *run_ranks(world, on_a_rank, cases, dtype), strict=True):
        *inputs, grad = whole_row(borders, dtype)
        inputs = [x.requires_grad_() for x in inputs]
        out = softmax_attention(*inputs, torch.tensor(borders, dtype=torch.int32))
        out.backward(grad)
        cut = Cut(borders, world, balanced)
        for number, expected in enumerate((out.detach(), *(x.grad for x in inputs))):
            found = cut.join([part[number] for part in parts])
            what = f"{borders} {balanced} {number}"
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=what)


def messages(borders, dtype=torch.float32):
    """How many messages of how many bytes this rank sends, forward and backward."""
    sent, exchange = [], dist.batch_isend_irecv

    def counted(operations):
        sent.extend(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return exchange(operations)

    with mock.patch.object(dist, "batch_isend_irecv", counted):
        cut, rank = Cut(borders, dist.get_world_size()), dist.get_rank()
        q, k, v, grad = (cut.take(x, rank).to(dtype) for x in whole_row(borders))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        ring_attention(*inputs, cut, dist.group.WORLD).backward(grad)
    return sent


def test_what_nobody_needs_is_not_sent():
    """Four ranks of eight tokens each; a token's keys and values are 2 x 2 heads x 8 numbers of four bytes."""
    token = 2 * KEY_HEADS * WIDTH * 4
    assert run_ranks(4, messages, (0, 8, 16, 24, 32)) == [[], [], [], []]
    # Of the second sample five tokens lie with rank 0 and two with rank 1, which sends their gradients home.
    assert run_ranks(4, messages, (0, 3, 10, 16, 24, 32)) == [[5 * token] * 2, [5 * token], [], []]
    # Gradients have the keys' dtype.
    half = 5 * token // 2
    assert run_ranks(4, messages, (0, 3, 10, 16, 24, 32), torch.bfloat16) == [[half] * 2, [half], [], []]
    # Of the last one eight lie with rank 2 and six with rank 3; the others have none of it.
    assert run_ranks(4, messages, (0, 8, 16, 30, 32)) == [[], [], [8 * token] * 2, [8 * token]]


def order_of_work(ahead_bytes):
    """In which steps this rank launches keys, computes with them, and sends gradients home, forward and backward; and
    how many gradients are to arrive at the most."""
    log, launch, blocks, home = [], ring._Ring._launch, ring._Ring.blocks, ring._Ring.send_home
    arriving = 0

    def launched(self, step, mine):
        log.append(f"launch {step}")
        return launch(self, step, mine)

    def computed(self, step):
        log.append(f"compute {step}")
        return blocks(self, step)

    def sent(self, step, gradients, mine):
        log.append(f"home {step}")
        nonlocal arriving
        arriving = max(arriving, 1 + len(Grads.last._arriving))
        return home(self, step, gradients, mine)

    class Grads(ring._Gradients):
        def __init__(self, *args):
            super().__init__(*args)
            Grads.last = self

    watched = {"_launch": launched, "blocks": computed, "send_home": sent}
    with (
        mock.patch.multiple(ring._Ring, **watched),
        mock.patch.multiple(ring, _Gradients=Grads, AHEAD=ahead_bytes),
    ):
        cut, rank = Cut((0, 8, 16, 24, 32), dist.get_world_size(), balanced=True), dist.get_rank()
        *inputs, grad = (cut.take(x, rank) for x in whole_row((0, 8, 16, 24, 32)))
        out = ring_attention(*(x.requires_grad_() for x in inputs), cut, dist.group.WORLD)
        forward = log[:]
        out.backward(grad)
    return forward, log[len(forward) :], arriving


def test_keys_come_from_their_owner_as_far_ahead_as_memory_allows():
    """Each sample lies with two neighbours, one after the other or the other way round: nothing in step 2. A rank gives
    8 tokens in a step, of 2 x 2 heads x 8 numbers of four bytes; backward there are their gradients, going and
    coming."""
    step = 8 * 2 * KEY_HEADS * WIDTH * 4
    one_ahead = ["launch 1", "compute 0", "launch 3", "compute 1", "compute 3"]
    all_ahead = ["launch 1", "launch 3", "compute 0", "compute 1", "compute 3"]
    for available, forward, backward, gradients in (
        (0, one_ahead, one_ahead, 1),
        (2 * step, all_ahead, one_ahead, 1),
        (6 * step, all_ahead, all_ahead, 2),
    ):
        homes = {"compute 1": ["home 1"], "compute 3": ["home 3"]}
        backward = [each for work in backward for each in (work, *homes.get(work, []))]
        assert run_ranks(4, order_of_work, available) == [(forward, backward, gradients)] * 4
