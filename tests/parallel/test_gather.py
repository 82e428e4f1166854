"""A model that is drawn and gathered part by part: the same weights, and no rank with more of them than it says."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from tests.parallel.test_seeing import CONFIG as SEEING
from tests.parallel.test_tensor import CONFIG as SMALL
from torch.distributed.tensor import DTensor

from fulmen.checkpoint import load_model, open_model, save_model
from fulmen.checkpoint.names import text_model
from fulmen.config import UserError
from fulmen.model import LanguageModel, VisionLanguageModel
from fulmen.parallel import Mesh, MeshSizes, SharedError, World
from fulmen.parallel.apply import parallelize
from fulmen.parallel.gather import GatheredWeights

CONFIG = dataclasses.replace(SMALL, num_layers=8)
MESHES = [
    {"dp": 2},
    {"tp": 2},
    {"pp": 2, "dp": 2, "ep": 2},
    {"pp": 2, "cp": 2, "tp": 2, "ep": 2},
    {"dp": 4, "ep": 2, "etp": 2},
]


def here(parameters):
    """How many numbers of these are on this rank."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters if not p.is_meta)


def drawn(sizes):
    """A model that was on the meta device; with how many numbers this rank held at most, and has in the end."""
    torch.manual_seed(3)
    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    held, original = [], LanguageModel.init_part

    def watched(model, part):
        original(model, part)
        held.append(here(model.parameters()))

    with mock.patch.object(LanguageModel, "init_part", watched):
        parallelize(model, Mesh(MeshSizes(**sizes), "cpu"))
    return model, (max(held), here(model.parameters()))


def gathered(sizes):
    model, held = drawn(sizes)
    weights = GatheredWeights(model, Mesh(MeshSizes(**sizes), "cpu"))
    names = [name for name, _ in weights.described.named_parameters()]
    return {name: weights.take(name) for name in names}, held


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_weights_of_one_process(sizes):
    torch.manual_seed(3)
    expected = LanguageModel(CONFIG)
    numbers = [sum(p.numel() for p in part.parameters()) for part in expected.parts()]
    ranks = math.prod(size for name, size in sizes.items() if name in ("pp", "dp", "cp", "tp"))
    found = run_ranks(ranks, gathered, sizes)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[0][0][name], parameter.detach()), name
    for _, (held, kept) in found:
        # Beside a layer only the embedding and the head, which come first and are sharded last.
        assert held <= kept + max(numbers) + sum(numbers[:2]) < sum(numbers)


def opened(folder, sizes):
    model = open_model(folder / "model")
    text, mesh = text_model(model), Mesh(MeshSizes(**sizes), "cpu")
    is_meta = all(p.is_meta for p in text.parameters())
    parallelize(model, mesh)
    weights = GatheredWeights(model, mesh)
    return is_meta, {name: weights.take(name) for name, _ in weights.described.named_parameters()}


@pytest.mark.parametrize("sees", [False, True], ids=["text", "images"])
def test_a_checkpoint_read_part_by_part(tmp_path, sees):
    model = VisionLanguageModel(SEEING) if sees else LanguageModel(CONFIG)
    save_model(model, tmp_path / "model", max_shard_bytes=5000)
    (is_meta, found), *_ = run_ranks(4, opened, tmp_path, {"pp": 2, "dp": 2, "ep": 2})
    assert is_meta
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.detach()), name


def saved(folder, sizes, broken):
    model, _ = drawn(sizes)
    world = World(Mesh(MeshSizes(**sizes), "cpu"))

    def write(model, weights):
        if broken:
            weights(next(iter(dict(model.named_parameters()))))
            raise UserError("the disk is full")
        save_model(model, folder / "model", weights=weights, max_shard_bytes=5000)

    try:
        world.save(model, write)
    except SharedError as error:
        return str(error)
    return dist.get_rank()


def test_a_checkpoint_in_several_files_straight_from_the_ranks(tmp_path):
    sizes = {"pp": 2, "dp": 2, "ep": 2}
    assert run_ranks(4, saved, tmp_path, sizes, False) == [0, 1, 2, 3]
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 5
    torch.manual_seed(3)
    for one, other in zip(load_model(tmp_path / "model").parameters(), LanguageModel(CONFIG).parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_breaks_half_way_is_told_on_all_ranks(tmp_path):
    assert run_ranks(4, saved, tmp_path, {"pp": 2, "dp": 2, "ep": 2}, True) == ["the disk is full"] * 4


def out_of_order():
    weights = GatheredWeights(drawn({"dp": 2})[0], Mesh(MeshSizes(dp=2), "cpu"))
    with pytest.raises(ValueError, match="the next parameter is embed_tokens"):
        weights.take("norm.weight")
    return True


def test_parameters_come_in_order():
    assert all(run_ranks(2, out_of_order))
