"""The step of all layers in one call: what the modules compute, and only where nobody could tell the difference."""

import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch

from fulmen.model import LanguageModel, ModelConfig, step
from fulmen.ops import cpu

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="there is no C compiler here")

ODD = ModelConfig(
    vocab_size=23,
    hidden_size=40,
    num_layers=4,
    layer_plan="LS",
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    rotary_dim=4,
    rope_theta=100.0,
    num_experts=5,
    experts_per_token=3,
    expert_size=24,
    lightning_beta=0.7,
    softmax_alpha=1.3,
    mlp_beta=0.9,
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LanguageModel(ODD).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


@pytest.fixture
def calls(monkeypatch):
    """The number of steps in one call so far."""
    counter, original = [], step.Step.__call__

    def counted(self, *arguments):
        counter.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(step.Step, "__call__", counted)
    return counter


def decode(model, tokens):
    """Logits of all tokens, one at a time."""
    cache = model.new_cache(len(tokens))
    return torch.cat([model(column, cache=cache) for column in tokens.split(1, dim=1)], dim=1)


def forward(model, tokens):
    """Logits of the modules, by PyTorch's operations, all tokens at once."""
    with torch.enable_grad():
        return model(tokens).detach()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_equals_the_modules(model, batch, threads, calls, poisoned_memory):
    torch.set_num_threads(threads)
    tokens = torch.randint(ODD.vocab_size, (batch, 9))
    torch.testing.assert_close(decode(model, tokens), forward(model, tokens), rtol=0, atol=2e-5)
    assert len(calls) == 8, "the first token finds an empty cache"


def test_keys_and_values_outgrow_their_buffer(model, calls):
    tokens = torch.randint(ODD.vocab_size, (2, 150))
    torch.testing.assert_close(decode(model, tokens), forward(model, tokens), rtol=0, atol=5e-5)
    assert len(calls) == 149


def test_bf16_weights_compute_in_fp32(model, calls):
    """What is rounded is a layer's input and output, keys and values; the modules round after every operation."""
    tokens = torch.randint(ODD.vocab_size, (3, 12))
    rounded = model.bfloat16()
    exact = forward(copy.deepcopy(rounded).float(), tokens)
    ours = (decode(rounded, tokens) - exact).norm() / exact.norm()
    assert len(calls) == 11
    modules = (forward(rounded, tokens) - exact).norm() / exact.norm()
    assert ours < 0.02
    assert ours < modules


def test_leaves_cache_and_routing_as_the_modules_do(model, monkeypatch):
    tokens = torch.randint(ODD.vocab_size, (2, 4))
    results = []
    for library in (cpu.load(), None):
        monkeypatch.setattr(cpu, "load", lambda library=library: library)
        cache = model.new_cache(2)
        model(tokens[:, :3], cache=cache)
        hidden, routings = model.hidden(tokens[:, 3:], cache=cache)
        results.append((hidden, routings, cache))
    (hidden, routings, cache), (expected, expected_routings, expected_cache) = results
    assert not torch.equal(hidden, expected)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(routings, expected_routings, rtol=0, atol=1e-5)
    assert cache.length == expected_cache.length == 4
    for layer, kind, other in zip(cache.layers, ODD.layers, expected_cache.layers, strict=True):
        if kind == "L":
            torch.testing.assert_close(layer.state, other.state, rtol=0, atol=1e-5)
        else:
            assert layer.length == other.length == 4
            torch.testing.assert_close(layer.keys[:, :4], other.keys[:, :4], rtol=0, atol=1e-5)
            torch.testing.assert_close(layer.values[:, :4], other.values[:, :4], rtol=0, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_company(model):
    x, memories = torch.randn(7, 1, ODD.hidden_size), []
    for _ in ODD.layers:
        memories.append((torch.randn(7, 6, 10, 10), *torch.randn(2, 7, 64, 2, 10)))
    results = []
    for rows in (slice(None), slice(3, 4)):
        cache = model.new_cache(len(x[rows]))
        cache.length = 5
        for layer, (state, keys, values) in zip(cache.layers, memories, strict=True):
            if hasattr(layer, "state"):
                layer.state = state[rows].clone()
            else:
                layer.keys, layer.values, layer.length = keys[rows].clone(), values[rows].clone(), 5
        results.append(step.decode_step(model, x[rows], cache)[0])
    assert torch.equal(results[0][3:4], results[1])


def test_nan_stays_in_its_sequence(model):
    tokens = torch.randint(1, ODD.vocab_size, (3, 4))
    clean = decode(model, tokens)
    model.embed_tokens.weight[0] = float("nan")
    tokens[1, 2] = 0
    dirty = decode(model, tokens)
    assert dirty[1, 2:].isnan().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def change_in_place(model):
    model.layers[1].self_attn.k_proj.weight.mul_(2)


def change_data(model):
    model.layers[0].block_sparse_moe.experts.w2.data = model.layers[0].block_sparse_moe.experts.w2.data * 2


def change_parameter(model):
    model.norm.weight = torch.nn.Parameter(model.norm.weight * 2)


def change_all(model):
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def change_dtype_and_back(model):
    model.bfloat16().float()


def change_module(model):
    model.layers[0] = copy.deepcopy(model.layers[2])


def change_constant(model):
    model.layers[2].mlp_alpha *= 2
    model.layers[2].input_layernorm.eps = 0.1


def change_depth(model):
    del model.layers[-1]
    model.config = dataclasses.replace(ODD, num_layers=3)


def change_depth_upwards(model):
    model.layers.append(copy.deepcopy(model.layers[0]))
    model.config = dataclasses.replace(ODD, num_layers=5)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_data,
        change_parameter,
        change_all,
        change_dtype_and_back,
        change_module,
        change_constant,
        change_depth,
        change_depth_upwards,
    ],
)
def test_weights_are_those_of_now(model, change, calls):
    tokens = torch.randint(ODD.vocab_size, (1, 5))
    before = decode(model, tokens)
    change(model)
    after = decode(model, tokens)
    assert len(calls) == 8
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, forward(model, tokens), rtol=0, atol=5e-5)


def listen(model):
    model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def listen_before(model):
    model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def wrap(model):
    original = model.layers[3].block_sparse_moe.forward
    model.layers[3].block_sparse_moe.forward = lambda *args, **kwargs: (original(*args, **kwargs)[0] * 2, None)


def adapt(model):
    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    model.layers[0].self_attn.out_proj = Adapted(model.layers[0].self_attn.out_proj)


def parametrize(model):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return weight * 2

    torch.nn.utils.parametrize.register_parametrization(model.layers[0].self_attn.out_proj, "weight", Twice())


@pytest.mark.parametrize("change", [listen, listen_before, wrap, adapt, parametrize])
def test_steps_back_where_a_module_is_not_its_own(model, change, calls):
    tokens = torch.randint(ODD.vocab_size, (1, 5))
    decode(model, tokens)
    calls.clear()
    change(model)
    logits = decode(model, tokens)
    assert not calls
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=2e-5)


def test_steps_back_for_gradients_and_autocast(model, calls):
    cache = model.new_cache(1)
    model(torch.tensor([[1]]), cache=cache)
    with torch.enable_grad():
        assert model(torch.tensor([[2]]), cache=cache).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[3]]), cache=cache)
    assert not calls


def test_steps_back_where_a_graph_holds_the_state(model, calls):
    """The step would change it in place, unseen by the backward pass."""
    cache = model.new_cache(1)
    with torch.enable_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
    state = cache.layers[0].state
    before = state.clone()
    model(torch.tensor([[3]]), cache=cache)
    assert not calls
    assert torch.equal(state, before)
    model(torch.tensor([[4]]), cache=cache)
    assert calls


def test_a_copy_of_model_or_cache_is_its_own(model, calls):
    tokens = torch.randint(ODD.vocab_size, (1, 5))
    cache = model.new_cache(1)
    for token in tokens[:, :3].split(1, dim=1):
        model(token, cache=cache)
    twin, fork = copy.deepcopy(model), copy.deepcopy(cache)
    twin.layers[0].self_attn.out_proj.weight.zero_()
    first, second = model(tokens[:, 3:4], cache=cache), model(tokens[:, 3:4], cache=fork)
    assert torch.equal(first, second)
    torch.testing.assert_close(decode(twin, tokens), forward(twin, tokens), rtol=0, atol=2e-5)
    torch.testing.assert_close(decode(model, tokens), forward(model, tokens), rtol=0, atol=2e-5)
    assert calls


def test_two_threads_decode_with_one_model(model):
    prompts = [torch.randint(ODD.vocab_size, (1, 60)) for _ in range(2)]
    expected, results = [decode(model, prompt) for prompt in prompts], [None, None]

    def work(index):
        with torch.no_grad():
            results[index] = decode(model, prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_pytorchs_defaults_do_not_matter(model):
    tokens = torch.randint(ODD.vocab_size, (1, 5))
    expected = decode(model, tokens)
    cache = model.new_cache(1)
    model(tokens[:, :1], cache=cache)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = [model(token, cache=cache) for token in tokens[:, 1:].split(1, dim=1)]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.cat(results, dim=1), expected[:, 1:])


def test_a_model_goes_when_nobody_holds_it(model):
    other = copy.deepcopy(model)
    decode(other, torch.tensor([[1, 2]]))
    assert other in step._PLANS
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
