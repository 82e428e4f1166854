"""A model whose heads, vocabulary and tokens are spread over ranks against the same model on one."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig
from fulmen.model.int8 import quantize_
from fulmen.model.vocabulary import Inserted
from fulmen.parallel import Cut, Mesh, MeshSizes
from fulmen.parallel.context import SliceContext
from fulmen.parallel.tensor import check_tensors, finish_gradients, replicated_parameters, shard_part

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=3,
    layer_plan="LSL",
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    expert_size=16,
    max_positions=64,
)
LONG, SHORT = (0, 5, 6, 30, 43), (0, 1, 3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def new_model():
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def new_row(borders):
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, CONFIG.vocab_size, (2, 1, borders[-1]))
    targets[0, borders[-1] // 2] = -100
    return tokens, targets


def packed(borders):
    return {"cu_seqlens": torch.tensor(borders, dtype=torch.int32)}


def sharded_model(**sizes):
    model, mesh = new_model(), Mesh(MeshSizes(**sizes), "cpu")
    check_tensors(model, mesh)
    for part in model.parts():
        shard_part(part, mesh)
    return model, mesh


def whole_gradients(model, mesh):
    """The sums over all ranks, of every parameter whole."""
    finish_gradients(model, mesh)
    whole = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
        dist.all_reduce(whole[name], group=dist.group.WORLD if ".experts." in name else mesh.group("cp"))
    return whole


def loss_on_a_rank(sizes, borders, checkpoint_layers):
    """The sums of the loss, of the number of targets and of gradients."""
    model, mesh = sharded_model(**sizes)
    row, where = new_row(borders), packed(borders)
    if mesh.sizes.cp > 1:
        cut, rank = Cut(borders, mesh.sizes.cp), mesh.rank("cp")
        row, where = [cut.take(x, rank) for x in row], {"cache": SliceContext(CONFIG, cut, mesh.group("cp"))}
    found = model.loss(*row, **where, checkpoint_layers=checkpoint_layers)
    (2 * found.nll).backward()
    sums = found.nll.detach(), found.targets
    for each in sums:
        dist.all_reduce(each)
    return *sums, whole_gradients(model, mesh)


@pytest.mark.parametrize(
    ("sizes", "borders", "checkpoint_layers"),
    [
        ({"tp": 2}, LONG, False),
        ({"tp": 4}, LONG, True),
        ({"tp": 4}, SHORT, False),
        ({"tp": 8}, LONG, False),
        ({"tp": 2, "cp": 2}, LONG, True),
        ({"tp": 2, "cp": 4}, SHORT, False),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(sizes, borders, checkpoint_layers):
    model = new_model()
    expected = model.loss(*new_row(borders), **packed(borders))
    (2 * expected.nll).backward()
    world = sizes["tp"] * sizes.get("cp", 1)
    for nll, targets, gradients in run_ranks(world, loss_on_a_rank, sizes, borders, checkpoint_layers):
        torch.testing.assert_close(nll, expected.nll.detach(), **CLOSE)
        assert targets == expected.targets
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def fsdp_on_a_rank():
    model, mesh = sharded_model(tp=2, dp=2)
    fully_shard(model, mesh=mesh.dense["dp"])
    model.set_force_sum_reduction_for_comms(True)
    model.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(model, "loss")
    (model.loss(*new_row(LONG), **packed(LONG)).nll / 2).backward()  # the same row on both replicas
    finish_gradients(model, mesh)
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if ".experts." not in name}


def test_fsdp_shards_the_parts_further():
    model = new_model()
    model.loss(*new_row(LONG), **packed(LONG)).nll.backward()
    for gradients in run_ranks(4, fsdp_on_a_rank):
        for name, found in gradients.items():
            torch.testing.assert_close(
                found, model.get_parameter(name).grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )


def only_the_head():
    model, mesh = sharded_model(tp=2)
    model.requires_grad_(False).lm_head.requires_grad_()
    model.loss(*new_row(SHORT)).nll.backward()
    finish_gradients(model, mesh)
    return model.lm_head.weight.grad.full_tensor()


def test_only_what_is_trained_has_gradients():
    model = new_model()
    model.loss(*new_row(SHORT)).nll.backward()
    for found in run_ranks(2, only_the_head):
        torch.testing.assert_close(found, model.lm_head.weight.grad, **CLOSE)


def outputs_on_a_rank():
    model, _ = sharded_model(tp=4)
    tokens, _ = new_row(LONG)
    with torch.no_grad():
        hidden, routing = model.hidden(tokens, **packed(LONG))
        cache = model.new_cache(1)
        pieces = [model(piece, cache=cache) for piece in tokens.split([30, 1, 1, 11], dim=1)]
        return hidden, routing[0].experts, model.logits(hidden), torch.cat(pieces, dim=1)


@torch.no_grad()
def test_outputs_are_those_of_one_process():
    """Hidden states and routing of a rank's own tokens; logits of all of them, also where a cache is continued."""
    model = new_model()
    tokens, _ = new_row(LONG)
    hidden, routing = model.hidden(tokens, **packed(LONG))
    for rank, found in enumerate(run_ranks(4, outputs_on_a_rank)):
        mine = slice(rank * 43 // 4, (rank + 1) * 43 // 4)
        torch.testing.assert_close(found[0], hidden[:, mine], **CLOSE)
        torch.testing.assert_close(found[1], routing[0].experts[mine])
        torch.testing.assert_close(found[2], model.logits(hidden), **CLOSE)
        torch.testing.assert_close(found[3], model(tokens), **CLOSE)


def insertion(model):
    tokens, _ = new_row(LONG)
    # So small that the first norm, by its eps, does not undo a wrong factor.
    vectors = (torch.randn(9, CONFIG.hidden_size, generator=torch.manual_seed(2)) / 100).requires_grad_()
    places = torch.tensor([0, 1, 2, 20, 21, 22, 40, 41, 42])
    hidden, _ = model.hidden(tokens, inserted=Inserted(places, vectors), **packed(LONG))
    return model.logits(hidden), vectors


def insertion_on_a_rank():
    model, mesh = sharded_model(tp=2)
    logits, vectors = insertion(model)
    (logits.square().sum() / 2).backward()  # each rank's share of one loss
    dist.all_reduce(vectors.grad)
    return logits.detach(), vectors.grad, whole_gradients(model, mesh)["lm_head.weight"]


def test_inserted_vectors_and_logits_have_the_gradients_of_one_process():
    model = new_model()
    logits, vectors = insertion(model)
    logits.square().sum().backward()
    for found in run_ranks(2, insertion_on_a_rank):
        expected = logits.detach(), vectors.grad, model.lm_head.weight.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def what_a_rank_holds():
    model, _ = sharded_model(tp=4)
    held = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        assert local.untyped_storage().nbytes() == local.numel() * local.itemsize, name
        held[name] = tuple(local.shape), parameter.placements if isinstance(parameter, DTensor) else None
    return held, list(replicated_parameters(model)), model.layers[0].self_attn.rates


def test_a_rank_holds_its_part():
    whole = new_model()
    expected = {
        "embed_tokens.weight": ((12, 32), Shard(0)),
        "lm_head.weight": ((12, 32), Shard(0)),
        "layers.0.self_attn.qkv_proj.weight": ((48, 32), Shard(0)),
        "layers.0.self_attn.output_gate.weight": ((16, 32), Shard(0)),
        "layers.0.self_attn.norm.weight": ((16,), Shard(0)),
        "layers.0.self_attn.out_proj.weight": ((32, 16), Shard(1)),
        "layers.1.self_attn.q_proj.weight": ((16, 32), Shard(0)),
        "layers.1.self_attn.o_proj.weight": ((32, 16), Shard(1)),
    }
    replicated = [
        f"layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in (
            *(["self_attn.k_proj", "self_attn.v_proj"] if layer == 1 else []),
            "block_sparse_moe.gate",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ]
    for rank, (held, summed, rates) in enumerate(run_ranks(4, what_a_rank_holds)):
        for name, (shape, placement) in expected.items():
            assert held[name] == (shape, (placement,)), name
        assert sorted(summed) == sorted([*replicated, "norm.weight"])
        for name in (*summed, "layers.0.block_sparse_moe.experts.w13"):
            assert held[name] == (tuple(whole.get_parameter(name).shape), None), name
        assert torch.equal(rates, whole.layers[0].self_attn.rates[2 * rank : 2 * rank + 2])


def refusals():
    mesh, messages = Mesh(MeshSizes(tp=4), "cpu"), []
    changes = [{"num_heads": 6, "num_kv_heads": 6}, {"vocab_size": 50}, {"num_heads": 12, "num_kv_heads": 6}]
    models = [LanguageModel(dataclasses.replace(CONFIG, **change)) for change in changes]
    models.append(new_model())
    quantize_(models[-1])
    for model in models:
        with pytest.raises(UserError) as refused:
            check_tensors(model, mesh)
        messages.append(str(refused.value))
    return messages


def test_what_cannot_be_divided_is_refused():
    assert run_ranks(4, refusals)[3] == [
        "num_heads must be a multiple of mesh.tp = 4, got 6: change either",
        "vocab_size must be a multiple of mesh.tp = 4, got 50: change either",
        "num_kv_heads 6 must be a multiple of mesh.tp = 4, or divide it: change either",
        "a model in int8 cannot be spread over mesh.tp ranks: load it in bfloat16, or take mesh.tp = 1",
    ]


def not_of_the_vocabulary():
    model, _ = sharded_model(tp=2)
    for token in (-1, 48):
        tokens, targets = new_row(SHORT)
        with pytest.raises(IndexError):
            model.hidden(torch.full_like(tokens, token))
        targets[0, 0] = token
        with pytest.raises(RuntimeError, match="out of bounds"):
            model.loss(tokens, targets)


def test_what_is_no_token_is_refused_on_every_rank():
    run_ranks(2, not_of_the_vocabulary)


def alone():
    model, mesh = sharded_model(tp=1)
    kinds = {type(module) for module in model.modules()} - {type(module) for module in new_model().modules()}
    model.loss(*new_row(SHORT)).nll.backward()
    before = model.norm.weight.grad.clone()
    finish_gradients(model, mesh)
    return kinds, torch.equal(model.norm.weight.grad, before)


def test_one_rank_is_left_as_it_is():
    assert run_ranks(1, alone) == [(set(), True)]
