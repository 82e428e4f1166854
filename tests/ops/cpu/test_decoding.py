"""The kernels for a few tokens against float64 references that share no line with them, at sizes that divide badly."""

import pytest
import torch

from fulmen.model import LanguageModel, ModelConfig
from fulmen.ops import cpu
from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.lightning import lightning_attention
from fulmen.ops.linear import linear, linear_f32
from fulmen.ops.norm import rms_norm

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="there is no C compiler here")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Also the smallest work is shared among the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(cpu, "WORTH_A_THREAD", 0)
    yield request.param
    torch.set_num_threads(before)


def without_library(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: None)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 63, 64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 15), (4, 16), (9, 17), (50, 131)])
def test_linear(rows, n, k, threads, poisoned_memory, relative_error):
    x, weight = torch.randn(rows, k), torch.randn(n, k)
    expected = (x.double()[:, None] * weight.double()).sum(-1)
    assert relative_error(cpu.linear(x, weight), expected) < 1e-6


def test_linear_takes_any_leading_dims_and_strides(relative_error):
    x, weight = torch.randn(37, 3, 2).permute(1, 2, 0), torch.randn(37, 10).T
    assert relative_error(cpu.linear(x, weight), x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("size", [1, 3, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_rms_norm(size, rows, poisoned_memory, relative_error):
    x, weight, eps = torch.randn(size, rows).T, torch.rand(size), 0.01
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    assert relative_error(cpu.rms_norm(x, weight, eps), expected) < 1e-6


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(1, 8, 2), (64, 8, 2), (5, 7, 7), (9, 1, 1), (33, 100, 3)])
def test_route(tokens, num_experts, k, poisoned_memory, relative_error):
    logits = torch.randn(num_experts, tokens).T * 10
    experts, weights, probs, counts = cpu.route(logits, k)
    expected = logits.double().softmax(-1)
    top, places = expected.topk(k)
    assert relative_error(probs, expected) < 1e-6
    assert torch.equal(experts, places)
    assert relative_error(weights, top / top.sum(-1, keepdim=True)) < 1e-6
    assert torch.equal(counts, torch.bincount(places.flatten(), minlength=num_experts))


def test_routes_of_nan_and_infinity_are_experts_that_exist():
    logits = torch.tensor([[float("nan")] * 3, [1.0, 2.0, -float("inf")], [0.0, float("nan"), 1.0]])
    experts, weights, probs, counts = cpu.route(logits, 2)
    assert experts.min() >= 0
    assert experts.max() < 3
    assert all(len(set(row)) == 2 for row in experts.tolist())
    assert counts.sum() == 6
    assert probs[1, 2] == 0
    assert weights[[0, 2]].isnan().all()
    assert weights[1].isfinite().all()


def dense_experts(x, w13, w2, experts, weights):
    x, w13, w2 = x.double(), w13.double(), w2.double()
    gate, up = torch.einsum("efd,td->tef", w13, x).chunk(2, dim=-1)
    answers = torch.einsum("edf,tef->ted", w2, gate / (1 + (-gate).exp()) * up)
    chosen = torch.zeros(len(x), len(w13), dtype=torch.float64).scatter_add_(1, experts, weights.double())
    return torch.einsum("te,ted->td", chosen, answers)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 64])
@pytest.mark.parametrize(("num_experts", "k", "d", "f"), [(6, 2, 33, 18), (1, 1, 5, 3), (3, 3, 16, 65)])
def test_experts(tokens, num_experts, k, d, f, threads, poisoned_memory, relative_error):
    x, w13, w2 = torch.randn(tokens, d), torch.randn(num_experts, 2 * f, d), torch.randn(num_experts, d, f)
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :k]
    weights = torch.rand(tokens, k)
    out = cpu.experts_mlp(x, w13, w2, experts, weights)
    assert relative_error(out, dense_experts(x, w13, w2, experts, weights)) < 2e-6


def test_one_expert_for_all_choices_of_all_tokens(threads, relative_error):
    """More choices of one expert than the kernel takes at a time."""
    x, w13, w2 = torch.randn(64, 9), torch.randn(4, 14, 9), torch.randn(4, 9, 7)
    experts, weights = torch.full((64, 3), 2), torch.rand(64, 3)
    out = cpu.experts_mlp(x, w13, w2, experts, weights)
    assert relative_error(out, dense_experts(x, w13, w2, experts, weights)) < 2e-6


def test_silu_far_out():
    """The gate alone decides: w1 = 1, w3 = 0 x + 1 by a second input."""
    gate = torch.tensor([-1000.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1000.0])
    x = torch.stack((gate, torch.ones(7)), dim=1)
    w13, w2 = torch.eye(2)[None], torch.ones(1, 2, 1)
    out = cpu.experts_mlp(x, w13, w2, torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1))
    torch.testing.assert_close(out[:, 0], torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("batch", "heads", "key_dim", "value_dim"), [(1, 4, 16, 16), (3, 2, 5, 9), (16, 1, 17, 1)])
def test_lightning_step(batch, heads, key_dim, value_dim, with_state, threads, poisoned_memory, relative_error):
    q, k = torch.randn(2, batch, 1, heads, key_dim)
    v, rates = torch.randn(batch, 1, heads, value_dim), torch.rand(heads)
    state = torch.randn(batch, heads, value_dim, key_dim).mT if with_state else None
    before = None if state is None else state.clone()
    out, following = lightning_attention(q, k, v, rates, state=state, return_state=True, backend="cpu")
    expected = torch.einsum("bhk,bhv->bhkv", k[:, 0].double(), v[:, 0].double())
    if with_state:
        expected = expected + (-rates.double()).exp()[:, None, None] * state.double()
        assert torch.equal(state, before)
    assert relative_error(following, expected) < 1e-6
    assert relative_error(out[:, 0], torch.einsum("bhk,bhkv->bhv", q[:, 0].double(), expected)) < 1e-6


def test_lightning_step_of_packed_projections(monkeypatch, relative_error):
    q, k, v = torch.randn(3, 1, 4, 3, 16).unbind(dim=3)
    expected, _ = lightning_attention(q, k, v, torch.rand(4), backend="naive")
    assert relative_error(lightning_attention(q, k, v, torch.rand(4))[0], expected) < 1e-6


@pytest.mark.parametrize("change", ["gradients", "dtype", "tokens", "no library"])
def test_insisting_on_the_kernel_where_it_cannot_be(change, monkeypatch):
    q = torch.randn(1, 2 if change == "tokens" else 1, 2, 4).to(torch.float64 if change == "dtype" else torch.float32)
    if change == "no library":
        without_library(monkeypatch)
    with (
        torch.set_grad_enabled(change == "gradients"),
        pytest.raises(ValueError, match='backend "cpu" takes one token'),
    ):
        lightning_attention(q, q, q, torch.rand(2), backend="cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad, threads):
    x, weight, w13, w2 = torch.randn(21, 19), torch.randn(13, 19), torch.randn(4, 10, 19), torch.randn(4, 19, 5)
    norm, state, rates = torch.rand(19), torch.randn(21, 2, 3, 3), torch.rand(2)

    def answers():
        experts, weights, _, _ = cpu.route(x[:, :4], 2)
        q = x[:, None, :6].unflatten(-1, (2, 3))
        step = cpu.lightning_step(q, q, q, rates, state)
        rest = (cpu.linear(x, weight), cpu.rms_norm(x, norm, 1e-5), cpu.experts_mlp(x, w13, w2, experts, weights))
        return [t.flatten(1) for t in (*step, *rest)]

    clean = answers()
    x[7] = bad
    others = torch.arange(21) != 7
    for after, before in zip(answers(), clean, strict=True):
        assert torch.equal(after[others], before[others])
        assert not after[7].isfinite().all()


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(cpu, "WORTH_A_THREAD", 0)
    x, weight = torch.randn(5, 100), torch.randn(77, 100)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(cpu.linear(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_serves_only_few_plain_fp32_tokens_without_gradients():
    x = torch.randn(2, 3)
    assert cpu.serves(1, x)
    assert cpu.serves(cpu.FEW, x, torch.nn.Parameter(x))
    assert not cpu.serves(0, x)
    assert not cpu.serves(cpu.FEW + 1, x)
    assert not cpu.serves(1, x, x.bfloat16())
    assert not cpu.serves(1, x.to("meta"))
    assert not cpu.serves(1, x.as_subclass(type("Other", (torch.Tensor,), {})))
    with torch.enable_grad():
        assert not cpu.serves(1, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.serves(1, x)


def test_shapes_that_do_not_fit_raise_instead_of_reading_elsewhere():
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError):
        linear(x, torch.randn(4, 6))
    with pytest.raises(RuntimeError):
        rms_norm(x, torch.randn(6), 1e-5)
    with pytest.raises(RuntimeError):
        route(x, 9)
    with pytest.raises(AssertionError):
        experts_mlp(x, torch.randn(3, 8, 12), torch.randn(3, 12, 4), route(torch.randn(2, 3), 2))


def test_linear_f32_does_not_round_under_autocast():
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_f32(x, weight)
    assert torch.equal(out, torch.nn.functional.linear(x.float(), weight))


def decode(model, tokens):
    cache = model.new_cache(len(tokens))
    return torch.cat([model(column, cache=cache) for column in tokens.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("batch", [1, 5])
def test_decoding_is_the_same_without_the_library(batch, monkeypatch):
    sizes = {"vocab_size": 61, "num_layers": 4, "layer_plan": "LS", "hidden_size": 40, "head_dim": 12}
    model = LanguageModel(ModelConfig.preset("tiny", rotary_dim=None, expert_size=24, **sizes)).eval()
    tokens = torch.randint(61, (batch, 9))
    with_kernels = decode(model, tokens)
    with torch.enable_grad():
        logits = model(tokens)
    assert logits.requires_grad
    without_library(monkeypatch)
    assert not torch.equal(decode(model, tokens), with_kernels), "the kernels were not used"
    torch.testing.assert_close(decode(model, tokens), with_kernels, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.detach(), with_kernels, rtol=0, atol=1e-5)


@torch.enable_grad()
def test_gradients_are_pytorchs(monkeypatch):
    """A kernel that ran where gradients are recorded would cut the graph."""
    for name in ("linear", "rms_norm", "route", "experts_mlp", "lightning_step"):
        monkeypatch.setattr(cpu, name, None)
    model = LanguageModel(ModelConfig.preset("tiny", vocab_size=11, num_layers=2, layer_plan="LS"))
    model(torch.tensor([[3]])).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters())
