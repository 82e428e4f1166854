"""Weights that stay gathered for a step: how often they and their gradients are sent, and that they are let go."""

from unittest import mock

import pytest
import torch
from tests.parallel.ranks import run_ranks
from tests.parallel.test_plan_traffic import Counted
from tests.parallel.test_runs import run
from tests.parallel.test_tensor import CONFIG
from tests.train.small import RECIPE, make_text
from torch.distributed.tensor import DTensor

from fulmen.data import Batch
from fulmen.model import LanguageModel
from fulmen.parallel import Mesh, MeshSizes, World, world

BORDERS = torch.tensor([0, 16, 40], dtype=torch.int32)


def sent(sizes, rows, keep_weights):
    """How often this rank gathers weights and sums gradients for rows of each replica; and whether all weights are
    sharded after that, and after rows that only went forward."""
    torch.manual_seed(0)
    ranks, model = World(Mesh(sizes, "cpu")), LanguageModel(CONFIG)
    ranks.shard(model, keep_weights=keep_weights)
    rows = [torch.randint(0, CONFIG.vocab_size, (1, 40)) for _ in range(rows * ranks.replicas)]
    batches = [Batch(row, row, BORDERS) for row in rows]

    def forward(batch):
        return model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)

    with Counted() as counted:
        ranks.run(batches, forward, lambda loss, counts: loss.nll * counts, CONFIG, torch.float32)
    trained = all(isinstance(parameter, DTensor) for parameter in model.layers.parameters())
    with torch.no_grad():
        ranks.run(batches, forward, None, CONFIG, torch.float32)
    evaluated = all(isinstance(parameter, DTensor) for parameter in model.layers.parameters())
    times = {kind: sum(n for (name, _), n in counted.times.items() if name == kind) for kind in KINDS}
    return times, (trained, evaluated)


KINDS = ("all_gather", "reduce_scatter")


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"pp": 2, "dp": 2}], ids=["dp", "pp x dp"])
def test_they_are_sent_once_a_step(sizes):
    sizes = MeshSizes(**sizes)
    times = {}
    for rows in (2, 4):
        for keep in (False, True):
            each = run_ranks(sizes.pp * sizes.dp, sent, sizes, rows, keep)
            assert all(sharded == (True, True) for _, sharded in each)
            times[rows, keep] = [found for found, _ in each]
    assert times[2, True] == times[4, True]
    for rank, (kept, two, four) in enumerate(zip(times[2, True], times[2, False], times[4, False], strict=True)):
        assert all(kept.values())
        for kind in KINDS:
            assert four[kind] == 2 * two[kind], (rank, kind)
        assert two["reduce_scatter"] == 2 * kept["reduce_scatter"]
        assert two["all_gather"] > 2 * kept["all_gather"]


def begun(folder):
    with mock.patch.object(world, "begin_row", wraps=world.begin_row) as begin_row:
        run(folder, "run", 2, "mesh.keep_weights=true")
    return [call.kwargs["last"] for call in begin_row.call_args_list if call.kwargs["trains"]]


def test_a_recipe_asks_for_it(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(make_text())
    # Two rows a step on one rank.
    assert run_ranks(1, begun, tmp_path) == [[False, True] * 2]
