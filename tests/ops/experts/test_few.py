"""The form for few tokens against the dense float64 oracle, and against the form that training uses."""

import pytest
import torch

from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.experts.few import FEW, few_tokens_mlp


def make(tokens, num_experts, *, width=16, expert=24, dtype=torch.float32, skew=0.0):
    x, w13 = torch.randn(tokens, width), torch.randn(num_experts, 2 * expert, width)
    w2 = torch.randn(num_experts, width, expert)
    logits = torch.randn(tokens, num_experts) + torch.arange(num_experts) * skew
    return x.to(dtype), (w13 / width**0.5).to(dtype), (w2 / expert**0.5).to(dtype), logits


def answer(mlp, x, w13, w2, logits, k):
    with torch.no_grad():
        return {"out": mlp(x, w13, w2, route(logits, k))}


def truth(oracle, case, k):
    return {"out": oracle(*(x.double() for x in case), k)}


@pytest.mark.parametrize("mlp", [few_tokens_mlp, experts_mlp])
@pytest.mark.parametrize("tokens", [1, 2, 7, FEW - 1, FEW, FEW + 1])
@pytest.mark.parametrize(("num_experts", "k"), [(6, 2), (6, 1), (3, 3), (1, 1)])
def test_outputs(mlp, tokens, num_experts, k, oracle, compare):
    case = make(tokens, num_experts)
    compare(answer(mlp, *case, k), truth(oracle, case, k), 1e-5)


@pytest.mark.parametrize("skew", [99.0, -99.0])
@pytest.mark.parametrize("tokens", [1, 20])
def test_all_tokens_to_the_same_experts(tokens, skew, oracle, compare):
    case = make(tokens, 5, skew=skew)
    compare(answer(few_tokens_mlp, *case, 2), truth(oracle, case, 2), 1e-5)


@pytest.mark.parametrize("tokens", [1, 20])
def test_it_is_the_form_of_training_without_its_gradients(tokens, compare):
    x, w13, w2, logits = make(tokens, 5)
    training = {"out": experts_mlp(x.requires_grad_(), w13, w2, route(logits, 2)).detach()}
    compare(answer(experts_mlp, x, w13, w2, logits, 2), training, 1e-6)


@pytest.mark.parametrize("tokens", [1, 20])
def test_bf16_and_autocast(tokens, oracle, compare):
    case = make(tokens, 5, dtype=torch.bfloat16)
    expected = truth(oracle, case, 2)
    narrow = answer(experts_mlp, *case, 2)
    assert narrow["out"].dtype == torch.bfloat16
    compare(narrow, expected, 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = answer(experts_mlp, *(x.float() for x in case), 2)
    assert cast["out"].dtype == torch.float32
    compare(cast, expected, 1e-2)


def test_a_nan_stays_with_its_token():
    x, w13, w2, logits = make(20, 4)
    clean = answer(experts_mlp, x, w13, w2, logits, 2)["out"]
    x[7] = float("nan")
    out = answer(experts_mlp, x, w13, w2, logits, 2)["out"]
    others = torch.arange(20) != 7
    assert out[7].isnan().all()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("tokens", [1, 20])
def test_every_element_is_written_and_the_input_left_alone(tokens, poisoned_memory):
    x, w13, w2, logits = make(tokens, 4)
    before = x.clone()
    assert answer(few_tokens_mlp, x, w13, w2, logits, 2)["out"].isfinite().all()
    assert torch.equal(x, before)


@torch.no_grad()
def test_a_capacity_is_kept_to_for_few_tokens_too(oracle, compare):
    case = make(20, 4, skew=3.0)
    routing = route(case[3], 2, 3)
    assert not routing.kept.all()
    expected = {"out": oracle(*(x.double() for x in case), 2, 3)}
    compare({"out": experts_mlp(*case[:3], routing)}, expected, 1e-5)
