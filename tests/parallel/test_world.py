"""What a world does beside the model."""

import torch
from tests.parallel.ranks import run_ranks
from tests.parallel.test_plan_traffic import Counted
from tests.parallel.test_tensor import CONFIG

from fulmen.model import LanguageModel
from fulmen.parallel import Mesh, MeshSizes, World


def sums(sizes):
    """How many sums over two ranks this one takes part in while a model is spread."""
    torch.manual_seed(0)
    with Counted() as counted:
        World(Mesh(sizes, "cpu")).shard(LanguageModel(CONFIG))
    return counted.times["all_reduce", 2]


def test_all_ranks_of_a_row_meet_before_any_sends_to_another():
    """NCCL makes a group in its first collective, for which it wants all ranks; the ring leaves some out."""
    assert run_ranks(4, sums, MeshSizes(cp=2)) == [1] * 4
    assert run_ranks(4, sums, MeshSizes(dp=4)) == [0] * 4
