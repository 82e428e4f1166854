"""A model whose experts are spread, each rank with a row of its own, against one process with all rows."""

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig
from fulmen.ops.experts import balance_loss
from fulmen.parallel import Mesh, MeshSizes
from fulmen.parallel.capacity import sum_counts
from fulmen.parallel.collectives import Waits
from fulmen.parallel.moe import SpreadExperts, check_experts

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, layer_plan="LS", num_heads=2, num_kv_heads=1, head_dim=8,
    num_experts=4, expert_size=16,
)  # fmt: skip
TOKENS = 24


def rows(world):
    """Tokens and targets [world, TOKENS]."""
    torch.manual_seed(3)
    return torch.randint(CONFIG.vocab_size, (2, world, TOKENS))


def new_model():
    torch.manual_seed(4)
    return LanguageModel(CONFIG)


def step(model, tokens, targets, factor, checkpointed, balance):
    """Loss, and gradients of the sum of it and the balance loss, by name."""
    model.zero_grad()
    loss = model.loss(tokens, targets, capacity_factor=factor, checkpoint_layers=checkpointed)
    (loss.nll + balance(loss.routing)).backward()
    kept = [routing.kept for routing in loss.routing if factor is not None]
    grads = {name: getattr(p.grad, "full_tensor", p.grad.clone)() for name, p in model.named_parameters()}
    return loss.nll.item(), kept, grads


def balance_of(routings):
    return 10 * sum(map(balance_loss, routings))


def spread_experts(model, mesh, *, groups=1, router=None):
    """Of all layers; what counts their waits."""
    check_experts(model, mesh, groups)
    waits = Waits()
    for layer in model.layers:
        moe = layer.block_sparse_moe
        moe.experts = SpreadExperts(moe.experts, mesh, groups=groups, router=router, waits=waits)
    return waits


CASES = [(None, False), (0.9, False), (0.9, True)]


def step_of_a_rank(sizes):
    mesh, rank, world = Mesh(MeshSizes(**sizes), "cpu"), dist.get_rank(), dist.group.WORLD
    model = new_model()
    waits = spread_experts(model, mesh, groups=3, router=world)
    tokens, targets = (part[rank : rank + 1] for part in rows(dist.get_world_size()))
    found = []
    for case in CASES:
        found.append(step(model, tokens, targets, *case, lambda routings: balance_of(sum_counts(routings, world))))
    with torch.no_grad():
        logits = model(tokens)
        cache = model.new_cache(1)
        by_token = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1)
    return found, (logits, by_token), waits.take()


@pytest.mark.parametrize("sizes", [dict(ep=2), dict(ep=2, etp=2), dict(edp=2, ep=2)], ids=str)
def test_a_step_of_a_model_is_that_of_one_process(sizes):
    ep, etp, edp = (sizes.get(name, 1) for name in ("ep", "etp", "edp"))
    world = ep * etp * edp
    ranks, model = run_ranks(world, step_of_a_rank, sizes), new_model()
    tokens, targets = rows(world)
    for number, (factor, checkpointed) in enumerate(CASES):
        nll, kept, grads = step(model, tokens, targets, factor, checkpointed, balance_of)
        steps = [found[number] for found, *_ in ranks]
        assert sum(nll for nll, *_ in steps) == pytest.approx(nll)
        for layer, whole in enumerate(kept):
            assert torch.equal(torch.cat([kept[layer] for _, kept, _ in steps]), whole)
        if factor is not None:
            assert not all(whole.all() for whole in kept)
        for name, grad in grads.items():
            found = [grads[name] for *_, grads in steps]
            if ".experts." in name:  # whole, the same on all ranks of a replica
                found = [found[first].view_as(grad) for first in range(0, world, ep * etp)]
            torch.testing.assert_close(sum(found), grad, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        logits = model(tokens)
    for rank, (_, given, waited) in enumerate(ranks):
        assert all(torch.allclose(found, logits[rank : rank + 1], atol=1e-5) for found in given)
        assert waited > 0


def limits_of_a_rank():
    rank, group = dist.get_rank(), dist.group.WORLD
    mesh = Mesh(MeshSizes(ep=2), "cpu")
    tokens = torch.randn(1, [8, 4][rank], CONFIG.hidden_size)
    found = []
    for router in (None, group):
        model = new_model()
        spread_experts(model, mesh, router=router)
        moe = model.layers[0].block_sparse_moe
        moe.gate.weight.data.zero_()  # all tokens take experts 0 and 1
        found.append(int(moe(tokens, 1.0)[1].kept.sum()))
    return found


def test_without_a_router_each_rank_has_its_own_capacity():
    """12 tokens, all to 2 of 4 experts: ceil(2 * 12 / 4) = 6 a expert of all, which the first rank takes alone."""
    assert run_ranks(2, limits_of_a_rank) == [[2 * 4, 2 * 6], [2 * 2, 0]]


def refusals():
    found = []
    for sizes, mesh, groups in ((dict(num_experts=3), "ep", 1), (dict(expert_size=24), "etp", 1), (dict(), "ep", 0)):
        model = LanguageModel(ModelConfig(**(vars(CONFIG) | sizes)))
        with pytest.raises(UserError) as error:
            check_experts(model, Mesh(MeshSizes(**{mesh: 2}), "cpu"), groups)
        found.append(str(error.value))
    return found


def test_experts_that_cannot_be_spread_evenly():
    for experts, width, groups in run_ranks(2, refusals):
        assert experts == "3 experts over 2 ranks: mesh.ep must divide their number, take another"
        rule = "mesh.etp must cut it into multiples of 8, as grouped products in bf16 ask"
        assert width == f"experts of width 24 over 2 ranks: {rule}, take another"
        assert groups == "tokens are cut into at least 1 group, not 0"


def what_is_kept(device):
    with torch.device(device):
        model = new_model()
    spread_experts(model, Mesh(MeshSizes(ep=2), "cpu"))
    module = model.layers[0].block_sparse_moe.experts
    assert isinstance(module, SpreadExperts)
    local = {name: p.to_local() for name, p in module.named_parameters()}
    shapes = {name: (tuple(p.shape), tuple(local[name].shape)) for name, p in module.named_parameters()}
    return shapes, [part.untyped_storage().nbytes() for part in local.values()], module.w13.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_rank_keeps_nothing_but_its_part(device):
    for shapes, storage, is_meta in run_ranks(2, what_is_kept, device):
        assert shapes == {"w13": ((4, 2, 16, 16), (2, 2, 16, 16)), "w2": ((4, 16, 16), (2, 16, 16))}
        assert storage == [4 * 2 * 2 * 16 * 16, 4 * 2 * 16 * 16]
        assert is_meta == (device == "meta")


def steps_of_shards():
    """Gradients of experts over edp x etp x ep by FSDP, whole."""
    mesh, model, rank = Mesh(MeshSizes(edp=2, etp=2, ep=2), "cpu"), new_model(), dist.get_rank()
    spread_experts(model, mesh, groups=2)
    for layer in model.layers:
        experts = layer.block_sparse_moe.experts
        # Of dims that no other axis cuts.
        fully_shard(experts, mesh=mesh.experts["edp"], shard_placement_fn=lambda p: Shard(3 if p.ndim == 4 else 1))
        experts.set_force_sum_reduction_for_comms(True)
        experts.set_gradient_divide_factor(1.0)
    tokens, targets = (part[rank : rank + 1] for part in rows(8))
    grads = step(model, tokens, targets, None, False, lambda routing: 0.0)[-1]
    return {name: grad for name, grad in grads.items() if ".experts." in name}


def test_replicas_may_be_sharded_on_top():
    tokens, targets = rows(8)
    expected = step(new_model(), tokens, targets, None, False, lambda routing: 0.0)[-1]
    for found in run_ranks(8, steps_of_shards):
        assert found
        for name, grad in found.items():
            torch.testing.assert_close(grad.view_as(expected[name]), expected[name], rtol=1e-5, atol=1e-5, msg=name)
