"""Stacked networks against plain ones, one agent after the other."""

import pytest
import torch
from torch import nn

from fulmen.config import UserError
from fulmen.marl.memory import MemorySettings, make_memory
from fulmen.marl.nets import ActionSpace, Network, RowAdam, Stack, linear_parts
from fulmen.marl.spec import TeamSpec


def make_network(agents=3, heads=1, **options):
    memory = make_memory(MemorySettings(), 5, "cpu")
    return Network(memory, agents=agents, observation_size=5, hidden=(7, 6), outputs=2, heads=heads, **options)


def plain(row, head=0):
    """The same layers as a Sequential of nn.Linear."""
    modules = []
    for layer in range(3):
        weight, bias = row[f"head{head}.layer{layer}.weight"], row[f"head{head}.layer{layer}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight.clone(), bias[0].clone()
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def grads(module):
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("use", ["outputs", "hidden", "both"])
def test_layers_and_all_their_gradients_are_those_of_plain_modules(head, use):
    network = make_network(heads=2, action_size=2)
    x, action = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3, 2, requires_grad=True)
    outputs, hidden = network.layers(x, action, head=head)
    loss = (outputs.sin().sum() if use != "hidden" else 0) + (hidden.square().sum() if use != "outputs" else 0)
    d_flat, d_action = torch.autograd.grad(loss, (network.flat, action))

    for agent in range(3):
        module = plain(network.row(agent), head)
        own = action[:, :, agent].detach().requires_grad_()
        features = module[:-1](torch.cat((x[:, :, agent], own), dim=-1))
        answer = module[-1](features)
        torch.testing.assert_close(outputs[:, :, agent], answer)
        torch.testing.assert_close(hidden[:, :, agent], features)
        loss = (answer.sin().sum() if use != "hidden" else 0) + (features.square().sum() if use != "outputs" else 0)
        (loss + 0 * answer.sum()).backward()
        torch.testing.assert_close(d_action[:, :, agent], own.grad)
        start = 0 if head == 0 else d_flat.shape[1] // 2
        torch.testing.assert_close(d_flat[agent, start : start + d_flat.shape[1] // 2], grads(module))
        assert d_flat[agent].norm() == pytest.approx(grads(module).norm().item(), rel=1e-5)


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    network, x = make_network(), torch.randn(4, 3, 5, requires_grad=True)
    network.layers(x, frozen=True)[0].sum().backward()
    assert network.flat.grad is None
    assert (x.grad != 0).any(dim=-1).all()


def test_a_shared_set_tells_agents_apart_by_their_one_hot():
    network = make_network(shared=True)
    assert network.flat.shape[0] == 1
    assert network.context_size == 5 + 3
    x = torch.randn(4, 1, 1, 5).expand(-1, -1, 3, -1)
    context, _ = network.context(x, {})
    assert torch.equal(context[0, 0, :, 5:], torch.eye(3))
    outputs, _ = network.layers(context)
    module = plain(network.row(0))
    for agent in range(3):
        torch.testing.assert_close(outputs[:, :, agent], module(context[:, :, agent]))
    assert not torch.allclose(outputs[:, :, 0], outputs[:, :, 1])


def test_first_weights_are_drawn_as_nn_linear_draws_them():
    stack = Stack(linear_parts("layer", 16, 4000), sets=2)
    weight = stack.unpack()["layer.weight"]
    assert weight.shape == (2, 4000, 16)
    assert weight.abs().max() <= 0.25
    assert weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert not torch.equal(weight[0], weight[1])
    equal = Stack(linear_parts("layer", 16, 4), sets=2, equal=True)
    assert torch.equal(equal.flat[0], equal.flat[1])
    assert equal.flat.std() > 0


def test_a_row_moves_to_another_stack_and_must_fit():
    source, target = make_network(agents=2), make_network(agents=4)
    before = target.flat.clone()
    target.load_row(3, source.row(1))
    assert torch.equal(target.flat[3], source.flat[1])
    assert torch.equal(target.flat[:3], before[:3])
    wide = make_network(action_size=1).row(0)
    with pytest.raises(UserError, match=r"head0.layer0.weight is \(7, 6\), needed is \(7, 5\)"):
        target.load_row(0, wide)
    part = source.row(0)
    del part["head0.layer1.bias"]
    with pytest.raises(UserError, match=r"head0.layer1.bias is missing"):
        target.load_row(0, part)


def test_each_row_has_an_adam_of_its_own():
    stack = Stack(linear_parts("layer", 3, 2), sets=3)
    adam = RowAdam(stack, lr=0.1, clip=0.5)
    rows = [row.clone().requires_grad_() for row in stack.flat.detach()]
    plain_adams = [torch.optim.Adam([row], lr=0.1) for row in rows]
    for step in range(6):
        if step == 3:
            # Row 1 begins anew, row 2 learns no more.
            adam.reset(1)
            plain_adams[1] = torch.optim.Adam([rows[1]], lr=0.1)
        learning = [0, 1, 2] if step < 3 else [0, 1]
        # Some rows are longer than the clip, some shorter.
        grad = torch.randn(3, 8) * torch.tensor([0.01, 1.0, 10.0])[:, None]
        norm = adam.step(stack, grad, learning)
        torch.testing.assert_close(norm, grad.norm(dim=1))
        for row in learning:
            rows[row].grad = grad[row].clone()
            nn.utils.clip_grad_norm_([rows[row]], 0.5)
            plain_adams[row].step()
        torch.testing.assert_close(stack.flat.detach(), torch.stack(rows).detach())
    assert adam.steps.tolist() == [6, 3, 3]


def continuous():
    low = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 5.0, -1.0]])
    high = torch.tensor([[1.0, 0.0, 0.0], [0.1, 7.0, 1.0]])
    return TeamSpec(agents=("a", "b"), observation_sizes=(3, 3), action_sizes=(2, 3), low=low, high=high)


def discrete():
    return TeamSpec(agents=("a", "b"), observation_sizes=(3, 3), action_sizes=(2, 4), discrete=True)


def test_continuous_actions_fill_their_bounds_and_stay_within():
    spec = continuous()
    space = ActionSpace(spec, noise=0.5, temperature=1.0, device="cpu")
    ends = space.scale(torch.tensor([-30.0, 30.0])[:, None, None].expand(2, 2, 3))
    torch.testing.assert_close(ends[0], spec.low)
    torch.testing.assert_close(ends[1], spec.high)
    assert torch.equal(space.unit(ends).abs().amax(0), spec.action_mask.float())
    middle = space.scale(torch.zeros(2, 3))
    torch.testing.assert_close(middle, (spec.low + spec.high) / 2)
    assert (space.unit(middle) == 0).all()
    for actions in (
        space.clamp(100 * torch.randn(500, 2, 3)),
        space.explore(middle.expand(500, 2, 3)),
        space.smooth(middle.expand(500, 2, 3), 0.5, 3.0),
        space.random(500),
    ):
        assert ((actions >= spec.low) & (actions <= spec.high)).all()
        assert (actions[:, 0, 2] == 0).all()
        assert (actions.std(dim=0)[spec.action_mask] > 0).all()


def test_noise_is_in_units_of_half_the_range():
    spec = continuous()
    space = ActionSpace(spec, noise=0.1, temperature=1.0, device="cpu")
    actions = space.explore(((spec.low + spec.high) / 2).expand(5000, 2, 3))
    torch.testing.assert_close(actions.std(dim=0), 0.1 * (spec.high - spec.low) / 2, rtol=0.05, atol=1e-6)
    shift = space.smooth(torch.tensor([[0.0, -1, 0], [0.05, 6, 0]]).expand(5000, 2, 3), 0.2, 0.5)[:, 1, 1] - 6
    assert shift.abs().max() == pytest.approx(0.5)
    assert shift.std().item() == pytest.approx(0.2, rel=0.05)


def test_discrete_actions_are_one_hot_among_an_agents_own_choices():
    space = ActionSpace(discrete(), noise=0.25, temperature=0.5, device="cpu")
    logits = torch.randn(2000, 2, 4) + torch.tensor([0.0, 0, 9, 9])
    greedy = space.clamp(space.scale(logits))
    assert torch.equal(greedy.sum(dim=-1), torch.ones(2000, 2))
    assert torch.equal(greedy[:, 0, :2].argmax(dim=-1), logits[:, 0, :2].argmax(dim=-1))
    assert torch.equal(greedy[:, 1].argmax(dim=-1), logits[:, 1].argmax(dim=-1))
    for actions in (space.explore(greedy), space.random(2000), space.sample(logits)):
        assert ((actions == 0) | (actions == 1)).all()
        assert torch.equal(actions.sum(dim=-1), torch.ones(2000, 2))
        assert (actions[:, 0, 2:] == 0).all()
    # A choice that is drawn anew may come out as before.
    changed = (space.explore(greedy) != greedy).any(dim=-1).float().mean(dim=0)
    torch.testing.assert_close(changed, 0.25 * torch.tensor([1 / 2, 3 / 4]), rtol=0.25, atol=0)
    assert torch.equal(space.smooth(greedy, 0.2, 0.5), greedy)


def test_drawn_choices_follow_the_logits_and_carry_the_soft_gradient():
    space = ActionSpace(discrete(), noise=0.0, temperature=0.5, device="cpu")
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, -1.0, 2.0]], requires_grad=True)
    actions = space.sample(logits.expand(4000, 2, 4))
    expected = logits[0, :2].softmax(dim=0)
    torch.testing.assert_close(actions.mean(dim=0)[0, :2], expected, rtol=0.05, atol=0.02)
    (gradient,) = torch.autograd.grad((actions * torch.tensor([1.0, 2, 3, 4])).sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[0, 2:] == 0).all()
    assert (gradient[0, :2] != 0).all()
    assert (gradient[1] != 0).all()


def test_penalty_is_the_mean_square_of_an_agents_own_outputs():
    space = ActionSpace(continuous(), noise=0.1, temperature=1.0, device="cpu")
    outputs = torch.tensor([[1.0, 2.0, 100.0], [1.0, 2.0, 3.0]])
    torch.testing.assert_close(space.penalty(outputs), torch.tensor([5 / 2, 14 / 3]))
