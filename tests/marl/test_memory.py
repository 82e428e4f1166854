"""Memories, stacked: recurrent equals parallel, and each agent's is what a plain one says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fulmen.config import UserError
from fulmen.marl.memory import MemorySettings, make_memory
from fulmen.marl.nets import Stack
from fulmen.ops.lightning import decay_rates

KINDS = ("lstm", "lightning")


def make(kind, layers=2, sets=3):
    memory = make_memory(MemorySettings(kind=kind, size=8, heads=2, layers=layers), 5, "cpu")
    stack = Stack(memory.parts, sets)
    # Norm weights begin as ones and would not tell the agents apart.
    stack.flat.data += 0.1 * torch.randn_like(stack.flat)
    return memory, stack


def start(memory, sets, sequences):
    return {name: torch.zeros(sets, sequences, *shape) for name, shape in memory.state_shapes.items()}


def step_by_step(memory, weights, x, state):
    outs = []
    for t in range(x.shape[2]):
        out, state = memory.run(weights, x[:, :, t : t + 1], state)
        outs.append(out)
    return torch.cat(outs, dim=2), state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [40, 70])
@pytest.mark.parametrize("gradients", [False, True])
def test_step_by_step_equals_the_whole_sequence(kind, steps, gradients):
    # Lightning attention cuts 40 steps into equal blocks, and 70 not.
    memory, stack = make(kind)
    x, half = torch.randn(3, 4, steps, 5), steps // 2
    with torch.set_grad_enabled(gradients):
        # The second half begins with the state that the first one left.
        first, state = memory.run(stack.unpack(), x[:, :, :half], start(memory, 3, 4))
        second, final = memory.run(stack.unpack(), x[:, :, half:], state)
        outs, end = step_by_step(memory, stack.unpack(), x, start(memory, 3, 4))
    whole, _ = memory.run(stack.unpack(), x, start(memory, 3, 4))
    assert whole.shape == (3, 4, steps, 8)
    torch.testing.assert_close(outs, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat((first, second), dim=2), whole, rtol=1e-5, atol=1e-5)
    for name, shape in memory.state_shapes.items():
        assert final[name].shape == (3, 4, *shape)
        torch.testing.assert_close(final[name], end[name], rtol=1e-5, atol=1e-5)
        assert (state[name] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_time_and_through_the_state(kind):
    memory, stack = make(kind)
    x = torch.randn(3, 2, 40, 5, requires_grad=True)
    state = {name: torch.randn_like(zeros).requires_grad_() for name, zeros in start(memory, 3, 2).items()}
    out, _ = memory.run(stack.unpack(), x, state)
    out[:, :, -1].sum().backward()
    assert (x.grad[:, :, 0].abs().sum(dim=-1) > 0).all()
    assert (stack.flat.grad.abs().sum(dim=1) > 0).all()
    for tensor in state.values():
        assert (tensor.grad != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_agents_memory_knows_nothing_of_the_others(kind):
    memory, stack = make(kind)
    x = torch.randn(3, 2, 6, 5)
    out, _ = memory.run(stack.unpack(), x, start(memory, 3, 2))
    alone, _ = make(kind, sets=1)
    single = Stack(alone.parts, 1)
    single.load_row(0, stack.row(1))
    own, _ = alone.run(single.unpack(), x[1:2], start(alone, 1, 2))
    torch.testing.assert_close(own[0], out[1])
    (gradient,) = torch.autograd.grad(out[1].sum(), stack.flat)
    assert (gradient[[0, 2]] == 0).all()


def test_lstm_is_pytorchs_with_the_forget_gates_one_higher():
    memory, stack = make("lstm")
    weights, x = stack.unpack(), torch.randn(3, 4, 9, 5)
    out, state = memory.run(weights, x, start(memory, 3, 4))
    for agent in range(3):
        lstm = nn.LSTM(5, 8, num_layers=2, batch_first=True)
        with torch.no_grad():
            for layer in range(2):
                # PyTorch's gates are in, forget, new, out.
                order = torch.arange(32).view(4, 8)[[0, 1, 3, 2]].flatten()
                getattr(lstm, f"weight_ih_l{layer}").copy_(weights[f"lstm{layer}.in.weight"][agent][order])
                getattr(lstm, f"weight_hh_l{layer}").copy_(weights[f"lstm{layer}.hidden"][agent][order])
                getattr(lstm, f"bias_ih_l{layer}").copy_(weights[f"lstm{layer}.in.bias"][agent][0][order])
                getattr(lstm, f"bias_hh_l{layer}").copy_(torch.eye(4)[1].repeat_interleave(8))
        expected, (hidden, cell) = lstm(x[agent])
        torch.testing.assert_close(out[agent], expected)
        torch.testing.assert_close(state["hidden"][agent], hidden.transpose(0, 1))
        torch.testing.assert_close(state["cell"][agent], cell.transpose(0, 1))


def lightning_by_hand(weights, x, agent, rates):
    """One agent's layer of size 8 with two heads, one sequence x [T, 5], one step after the other."""

    def linear(name, y):
        return F.linear(y, weights[f"{name}.weight"][agent], weights[f"{name}.bias"][agent][0])

    def normed(name, y):
        return y / (y.square().mean() + 1e-6).sqrt() * weights[f"lightning0.{name}"][agent][0]

    outs, states = [], torch.zeros(2, 4, 4)
    for observation in x:
        u = linear("lightning.in", observation)
        q, k, v = F.silu(linear("lightning0.qkv", u)).view(3, 2, 4)
        states = states * torch.exp(-rates)[:, None, None] + k[:, :, None] * v[:, None, :]
        heads = torch.einsum("hk,hkv->hv", q, states).flatten()
        gated = normed("norm", heads) * linear("lightning0.gate", u).sigmoid()
        outs.append(normed("post_norm", u + linear("lightning0.out", gated)))
    return torch.stack(outs)


def test_lightning_is_the_gated_layer_with_decaying_heads():
    memory, stack = make("lightning", layers=1)
    weights, x = stack.unpack(), torch.randn(3, 2, 7, 5)
    for name in ("norm", "post_norm"):  # which begin at 1
        weights[f"lightning0.{name}"] = 0.5 + torch.rand(3, 1, 8)
    out, _ = memory.run(weights, x, start(memory, 3, 2))
    for agent in range(3):
        expected = lightning_by_hand(weights, x[agent, 1], agent, decay_rates(2, 0, 2))
        torch.testing.assert_close(out[agent, 1], expected, rtol=1e-5, atol=1e-5)


def test_no_memory_has_no_numbers():
    memory = make_memory(MemorySettings(), 5, "cpu")
    assert (memory.size, memory.parts, memory.state_shapes) == (0, {}, {})
    out, state = memory.run({}, torch.randn(3, 2, 4, 5), {})
    assert out.shape == (3, 2, 4, 0)
    assert state == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gru"}, "memory kind must be one of none, lstm, lightning, got 'gru'"),
        ({"size": 0}, "memory size must be at least 1, got 0"),
        ({"layers": 0}, "memory layers must be at least 1, got 0"),
        ({"heads": -1}, "memory heads must be at least 1, got -1"),
        ({"kind": "lightning", "size": 10, "heads": 4}, "a multiple of its heads, got size 10, heads 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MemorySettings(**settings)
