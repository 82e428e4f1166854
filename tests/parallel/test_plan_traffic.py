"""What the planner says that a rank sends is what ranks are seen to send."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from tests.parallel.test_tensor import CONFIG
from torch.utils._python_dispatch import TorchDispatchMode

from fulmen.model import LanguageModel
from fulmen.parallel import Cut, Mesh, MeshSizes
from fulmen.parallel.apply import begin_row, parallelize
from fulmen.parallel.context import SliceContext
from fulmen.parallel.plan import Job, Placement
from fulmen.parallel.plan.traffic import step_traffic
from fulmen.parallel.tensor import finish_gradients

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "allreduce_": "all_reduce",
    "send": "send",
}


class Counted(TorchDispatchMode):
    """Counts collectives, and bytes of what this rank gives to them, by kind and number of ranks."""

    def __init__(self):
        super().__init__()
        self.times, self.given = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(func._opname) if func.namespace == "c10d" else None
        if kind is not None:
            # The output comes first, unless it takes the input's place.
            tensor = args[0] if kind in ("all_reduce", "send") else args[1]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            ranks = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject))).size()
            if ranks > 1:
                self.times[kind, ranks] += 1
                self.given[kind, ranks] += tensor.nbytes
        return func(*args, **(kwargs or {}))


def step_on_a_rank(sizes, options):
    """A step of rows of 64 tokens, of equal samples, for each replica; what is counted."""
    torch.manual_seed(0)
    mesh, model = Mesh(sizes, "cpu"), LanguageModel(CONFIG)
    dtype = torch.bfloat16 if options.get("number") == 2 else torch.float32
    parallelize(model, mesh, token_groups=options.get("groups", 1), dtype=dtype)
    borders = tuple(range(0, 65, 64 // options.get("samples", 1)))
    cut = Cut(borders, mesh.sizes.cp, options.get("balanced", False) and mesh.sizes.cp > 1)
    row = torch.randint(0, CONFIG.vocab_size, (1, 64))
    where = {"cache": SliceContext(CONFIG, cut, mesh.group("cp"))} if mesh.sizes.cp > 1 else {}
    mine = cut.take(row, mesh.rank("cp"))
    with Counted() as counted, torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        for left in reversed(range(options.get("rows", 1))):
            if options.get("keep"):
                begin_row(model, trains=True, last=left == 0)
            found = model.loss(mine, mine, **where, checkpoint_layers=options.get("checkpoint", False))
            found.nll.backward()
        finish_gradients(model, mesh)
    return counted.times, counted.given


def planned(sizes, options):
    given = {"samples": 1, "checkpoint": False, "balanced": False, "groups": 1, "number": 4} | options
    placement = Placement(
        job=Job(config=CONFIG, context=64 // given["samples"], batch=64 * sizes.dp * given.pop("rows", 1)),
        sizes=sizes,
        load=1.0,
        **given,
    )
    times, total = Counter(), Counter()
    for record in step_traffic(placement, placement.stages[0]):
        times[record.kind, record.group.ranks] += record.count
        total[record.kind, record.group.ranks] += record.count * record.payload
    return dict(times), dict(total)


CASES = {
    "cp": (4, {"cp": 4}, {}),
    "cp balanced, computed again": (4, {"cp": 4}, {"balanced": True, "checkpoint": True}),
    "cp balanced, several samples": (4, {"cp": 4}, {"balanced": True, "samples": 4}),
    "tp": (2, {"tp": 2}, {}),
    "more tp than heads of keys, computed again": (4, {"tp": 4}, {"checkpoint": True}),
    "fsdp, computed again": (2, {"dp": 2}, {"checkpoint": True}),
    "fsdp in bf16, computed again": (2, {"dp": 2}, {"number": 2, "checkpoint": True}),
    "fsdp, several rows": (2, {"dp": 2}, {"rows": 3}),
    "fsdp, weights that stay gathered": (2, {"dp": 2}, {"rows": 3, "keep": True, "checkpoint": True}),
    "cp, ep, weights that stay gathered": (2, {"cp": 2, "ep": 2}, {"rows": 3, "keep": True}),
    "fsdp, ep, computed again": (2, {"dp": 2, "ep": 2}, {"groups": 2, "checkpoint": True}),
    "ep x etp, computed again": (4, {"ep": 2, "etp": 2}, {"groups": 4, "checkpoint": True}),
    "cp x tp, ep": (4, {"cp": 2, "tp": 2, "ep": 4}, {"groups": 2}),
}


@pytest.mark.parametrize(("world", "sizes", "options"), CASES.values(), ids=CASES)
def test_counted_collectives_are_the_planned_ones(world, sizes, options):
    sizes = MeshSizes(**sizes).fitted(world)
    times, given = Counter(), Counter()
    for one_times, one_given in run_ranks(world, step_on_a_rank, sizes, options):
        times.update(one_times)
        given.update(one_given)
    expected_times, expected = planned(sizes, options)
    assert {key: count / world for key, count in times.items()} == pytest.approx(expected_times)
    assert {key: count / world for key, count in given.items()} == pytest.approx(expected)
