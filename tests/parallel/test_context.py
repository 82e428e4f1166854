"""A model whose rows are cut over ranks against the same model on one."""

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks

from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig
from fulmen.parallel import Cut
from fulmen.parallel.context import SliceContext

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=3,
    layer_plan="LSL",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    expert_size=16,
    max_positions=64,
)
BORDERS = (0, 5, 6, 30, 43)


def model_and_row():
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    tokens, targets = torch.randint(0, 48, (2, 1, BORDERS[-1]))
    targets[0, 7] = -100
    return model, tokens, targets


def on_a_rank(balanced, checkpoint_layers):
    """The sums of loss and gradients over all ranks."""
    model, tokens, targets = model_and_row()
    cut, rank, group = Cut(BORDERS, dist.get_world_size(), balanced), dist.get_rank(), dist.group.WORLD
    found = model.loss(
        *(cut.take(x, rank) for x in (tokens, targets)),
        cache=SliceContext(CONFIG, cut, group),
        checkpoint_layers=checkpoint_layers,
    )
    found.nll.backward()
    sums = [found.nll.detach(), *(p.grad for p in model.parameters())]
    for each in sums:
        dist.all_reduce(each)
    return sums


@pytest.mark.parametrize(("world", "balanced", "checkpoint"), [(2, True, False), (4, False, True), (8, True, True)])
def test_loss_and_gradients_are_those_of_one_process(world, balanced, checkpoint):
    model, tokens, targets = model_and_row()
    expected = model.loss(tokens, targets, cu_seqlens=torch.tensor(BORDERS, dtype=torch.int32))
    expected.nll.backward()
    for sums in run_ranks(world, on_a_rank, balanced, checkpoint):
        torch.testing.assert_close(sums[0], expected.nll.detach(), rtol=1e-6, atol=1e-5)
        for (name, parameter), found in zip(model.named_parameters(), sums[1:], strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def wrong_slices():
    model, tokens, _ = model_and_row()
    messages = []
    for case, cut in ((tokens, Cut(BORDERS, 2)), (tokens[:, :35], Cut((0, 70), 2))):
        with pytest.raises(UserError) as refused:
            model.hidden(case, cache=SliceContext(CONFIG, cut, dist.group.WORLD))
        messages.append(str(refused.value))
    return messages


def test_what_is_no_slice_of_the_row_is_refused():
    for rank, (slice_, longest) in enumerate(run_ranks(2, wrong_slices)):
        assert slice_ == f"rank {rank} of 2 holds {21 + rank} tokens of one row of 43, got tokens (1, 43)"
        assert longest == "70 positions exceed the model's max_positions 64"
