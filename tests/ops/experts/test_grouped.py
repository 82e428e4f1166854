"""The experts' grouped products against the dense float64 oracle and the naive form."""

import pytest
import torch

from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.experts.grouped import ROUND
from fulmen.ops.experts.naive import naive_experts_mlp

WIDTH, EXPERT = 16, 24
NAMES = ("x", "w13", "w2", "logits")


def make(tokens, num_experts, *, skew=None, dtype=torch.float32, width=WIDTH, expert=EXPERT):
    shapes = ((tokens, width), (num_experts, 2 * expert, width), (num_experts, width, expert), (tokens, num_experts))
    case = dict(zip(NAMES, (torch.randn(shape) for shape in shapes), strict=True))
    case["w13"], case["w2"] = case["w13"] / width**0.5, case["w2"] / expert**0.5
    if skew is not None:
        case["logits"] += torch.tensor(skew)
    # Logits stay in fp32, so that rounding cannot change who is chosen.
    return {name: x if name == "logits" else x.to(dtype) for name, x in case.items()} | {
        "d_out": torch.randn(tokens, width)
    }


def by(mlp):
    def function(x, w13, w2, logits, k, capacity):
        return mlp(x, w13, w2, route(logits, k, capacity))

    return function


def results(function, case, k, capacity=None, dtype=None):
    leaves = [case[name].to(dtype or case[name].dtype).detach().clone().requires_grad_() for name in NAMES]
    out = function(*leaves, k, capacity)
    grads = torch.autograd.grad((out * case["d_out"].to(out.dtype)).sum(), leaves, materialize_grads=True)
    return dict(zip(("out", *(f"d_{name}" for name in NAMES)), (out.detach(), *grads), strict=True))


@pytest.mark.parametrize("capacity", [None, 3, 17])
@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(40, 6, 2), (40, 6, 1), (40, 3, 3), (40, 1, 1), (1, 6, 2)])
def test_outputs_and_gradients(tokens, num_experts, k, capacity, oracle, compare):
    case = make(tokens, num_experts)
    expected = results(oracle, case, k, capacity, torch.float64)
    compare(results(by(experts_mlp), case, k, capacity), expected, 1e-5)
    compare(results(by(naive_experts_mlp), case, k, capacity), expected, 1e-5)


@pytest.mark.parametrize("tokens", [ROUND - 1, ROUND, ROUND + 1, 4 * ROUND, 4 * ROUND + 1, 5 * ROUND, 333])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 1), (4, 2)])
def test_sizes_around_the_padding(tokens, num_experts, k, oracle, compare):
    case = make(tokens, num_experts)
    compare(results(by(experts_mlp), case, k), results(oracle, case, k, None, torch.float64), 1e-5)


@pytest.mark.parametrize("tokens", [7, 400])
@pytest.mark.parametrize(
    "skew", [[99.0, 0, -99, -99], [-99.0, 99, 0, -99], [-99.0, -99, 99, 0], [0.0, 0, -99, -99], [-99.0, -99, 0, 0]]
)
@pytest.mark.parametrize("k", [1, 2])
def test_experts_without_tokens_and_experts_with_all(tokens, skew, k, oracle, compare):
    case = make(tokens, 4, skew=skew)
    actual = results(by(experts_mlp), case, k)
    compare(actual, results(oracle, case, k, None, torch.float64), 1e-5)
    idle = route(case["logits"], k).counts == 0
    assert idle.any()
    assert actual["d_w13"][idle].eq(0).all()
    assert actual["d_w2"][idle].eq(0).all()


@pytest.mark.parametrize("tokens", [30, 500])
def test_a_token_whose_choices_are_all_dropped_gets_zero(tokens, oracle, compare):
    case = make(tokens, 4, skew=[4.0, 3, 0, 0])
    actual = results(by(experts_mlp), case, 2, 2)
    compare(actual, results(oracle, case, 2, 2, torch.float64), 1e-5)
    dropped = ~route(case["logits"], 2, 2).kept.any(dim=1)
    assert dropped.sum() > tokens / 2
    assert actual["out"][dropped].eq(0).all()
    assert actual["d_x"][dropped].eq(0).all()


def test_no_capacity_at_all():
    actual = results(by(experts_mlp), make(30, 4), 2, 0)
    assert all(x.eq(0).all() for x in actual.values())


@pytest.mark.parametrize("capacity", [None, 3])
def test_no_tokens_at_all(capacity):
    case = make(0, 4)
    actual = results(by(experts_mlp), case, 2, capacity)
    with torch.no_grad():
        out = experts_mlp(*(case[name] for name in ("x", "w13", "w2")), route(case["logits"], 2, capacity))
    assert out.shape == actual["out"].shape == actual["d_x"].shape == (0, WIDTH)
    assert all(actual[name].shape == case[name[2:]].shape and actual[name].eq(0).all() for name in ("d_w13", "d_w2"))


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("expert", range(4))
def test_a_nan_stays_with_its_token(expert, capacity):
    case = make(300, 4)
    clean = results(by(experts_mlp), case, 2, capacity)
    # Each expert's first row, which padding or a dropped choice may read, is bad once.
    token = (route(case["logits"], 2).experts == expert).any(dim=1).nonzero()[0, 0]
    case["x"][token] = float("nan")
    actual = results(by(experts_mlp), case, 2, capacity)
    others = torch.arange(300) != token
    for name in ("out", "d_x", "d_logits"):
        assert actual[name][token].isnan().any()
        assert torch.equal(actual[name][others], clean[name][others]), name


@pytest.mark.parametrize("tokens", [30, 500])
@pytest.mark.parametrize("capacity", [None, 9])
def test_every_element_is_written(tokens, capacity, poisoned_memory):
    for name, x in results(by(experts_mlp), make(tokens, 4), 2, capacity).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("tokens", [30, 500])
def test_bf16(tokens, oracle, compare):
    case = make(tokens, 4, dtype=torch.bfloat16)
    actual = results(by(experts_mlp), case, 2)
    assert {actual[name].dtype for name in ("out", "d_x", "d_w13", "d_w2")} == {torch.bfloat16}
    assert actual["d_logits"].dtype == torch.float32
    compare(actual, results(oracle, case, 2, None, torch.float64), 1e-2)


def test_autocast_multiplies_in_bf16_and_gives_back_the_dtype_of_x(oracle, compare):
    case = make(100, 4)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(by(experts_mlp), case, 2)
    assert {x.dtype for x in actual.values()} == {torch.float32}
    expected = results(oracle, case, 2, None, torch.float64)
    compare(actual, expected, 1e-2)
    assert not torch.allclose(actual["out"].double(), expected["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [30, 500])
@pytest.mark.parametrize(("alpha", "beta"), [(1.7, 1.0), (1.7, 0.6), (0.0, 0.6)])
def test_the_residual_sum(tokens, alpha, beta, oracle, compare):
    def ours(x, w13, w2, logits, k, capacity):
        return experts_mlp(x, w13, w2, route(logits, k, capacity), alpha=alpha, beta=beta)

    def truth(x, *others):
        return alpha * x + beta * oracle(x, *others)

    case = make(tokens, 4)
    compare(results(ours, case, 2, 20), results(truth, case, 2, 20, torch.float64), 1e-5)
    with torch.no_grad():
        few = ours(*(case[name] for name in NAMES), 2, None)
    compare({"out": few}, {"out": truth(*(case[name].double() for name in NAMES), 2, None)}, 1e-5)


def test_only_some_gradients_are_wanted(oracle, compare):
    case = make(50, 4)
    expected = results(oracle, case, 2, None, torch.float64)
    x = case["x"].clone().requires_grad_()
    out = experts_mlp(x, case["w13"], case["w2"], route(case["logits"], 2))
    compare({"d_x": torch.autograd.grad((out * case["d_out"]).sum(), x)[0]}, {"d_x": expected["d_x"]}, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "expert"), [(10, 24), (16, 6), (5, 3)])
def test_widths_that_fill_no_16_bytes(width, expert, dtype):
    case = make(30, 4, width=width, expert=expert, dtype=dtype)
    with pytest.raises(ValueError, match=f"multiples of {16 // dtype.itemsize} in {dtype}, got {width} and {expert}"):
        results(by(experts_mlp), case, 2)


def test_no_expert_is_visited_by_a_loop():
    """The number of operations does not grow with the number of experts."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for num_experts in (2, 16):
        case = make(64, num_experts)
        with Counter() as counter:
            results(by(experts_mlp), case, 2)
        counts.append(counter.count)
    assert counts[0] == counts[1]
