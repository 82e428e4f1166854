"""Drawing a token: what can be drawn, how often, and that a seed repeats it."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fulmen.config import UserError
from fulmen.serve import SamplingParams, sample


def draws(logits, count=2000, **settings):
    params = SamplingParams(seed=0, **settings)
    generator = params.generator()
    return Counter(sample(torch.tensor(logits), params, generator) for _ in range(count))


def log(*probabilities):
    return [math.log(p) for p in probabilities]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"temperature": math.inf}, "temperature must be 0 or more, got inf"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"stop": ("a", "")}, "a stop string must not be empty"),
        ({"seed": -1}, "seed must be at least 0 and below 2**63, got -1"),
        ({"seed": 2**63}, f"seed must be at least 0 and below 2**63, got {2**63}"),
    ],
)
def test_guard(settings, message):
    with pytest.raises(UserError) as caught:
        SamplingParams(**settings)
    assert str(caught.value) == message


def test_greedy_takes_the_likeliest():
    assert draws([0.1, 3.0, 2.9], temperature=0) == {1: 2000}
    assert draws([0.1, 3.0, 2.9], temperature=0, top_k=2, top_p=0.1) == {1: 2000}


def test_frequencies_follow_the_probabilities():
    counts = draws(log(0.5, 0.3, 0.2), 20_000, temperature=1.0)
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        deviation = math.sqrt(20_000 * probability * (1 - probability))
        assert abs(counts[token] - 20_000 * probability) < 4 * deviation


def test_temperature_is_a_power_of_the_probabilities():
    counts = draws(log(0.5, 0.3, 0.2), 20_000, temperature=0.5)
    expected = [p**2 / (0.25 + 0.09 + 0.04) for p in (0.5, 0.3, 0.2)]
    for token, probability in enumerate(expected):
        assert abs(counts[token] - 20_000 * probability) < 4 * math.sqrt(20_000 * probability * (1 - probability))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-50, 5e-324])
def test_the_coldest_temperatures_are_greedy(temperature):
    assert draws([1.0, 2.0, -50.0, 1.5], temperature=temperature) == {1: 2000}
    # Exactly tied, both are as likely as before.
    assert set(draws([1.0, 1.0, 0.0], temperature=temperature)) == {0, 1}


def test_the_hottest_temperature_forgets_the_logits():
    counts = draws([0.0, 50.0, -50.0, 10.0], 8000, temperature=1e30)
    assert all(abs(counts[token] - 2000) < 4 * math.sqrt(8000 * 0.25 * 0.75) for token in range(4))


def test_top_k():
    assert set(draws([1.0, 4.0, 3.0, 2.0], temperature=5.0, top_k=2)) == {1, 2}
    assert set(draws([1.0, 4.0, 3.0, 2.0], temperature=5.0, top_k=1)) == {1}
    assert set(draws([1.0, 4.0, 3.0, 2.0], temperature=5.0, top_k=99)) == {0, 1, 2, 3}
    assert len(draws([1.0, 1.0, 1.0, 1.0], temperature=1.0, top_k=3)) == 3


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-300, {2}),
        (0.49, {2}),
        (0.51, {2, 0}),
        (0.79, {2, 0}),
        (0.81, {2, 0, 3}),
        (0.96, {2, 0, 3, 1}),
        (1.0, {2, 0, 3, 1}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, expected):
    assert set(draws(log(0.3, 0.05, 0.5, 0.15), temperature=1.0, top_p=top_p)) == expected


def test_top_p_among_equals_keeps_just_enough():
    assert len(draws([0.0] * 10, temperature=1.0, top_p=0.35)) == 4
    assert len(draws([0.0] * 8, temperature=1.0, top_p=0.25)) == 2


def test_top_p_counts_within_top_k():
    """Of (0.5, 0.3 | 0.2) the first is 0.625 of the two that top-k leaves."""
    assert set(draws(log(0.5, 0.3, 0.2), temperature=1.0, top_k=2, top_p=0.6)) == {0}
    assert set(draws(log(0.5, 0.3, 0.2), temperature=1.0, top_p=0.6)) == {0, 1}


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    st.integers(0, 13),
    st.floats(1e-6, 1),
    st.floats(0.01, 10),
)
def test_what_is_drawn_was_allowed(logits, top_k, top_p, temperature):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=1)
    token = sample(torch.tensor(logits), params, params.generator())
    order = sorted(logits, reverse=True)[: top_k or None]
    weights = [math.exp((logit - order[0]) / temperature) for logit in order]
    before = sum(w for w, logit in zip(weights, order, strict=True) if logit > logits[token]) / sum(weights)
    assert logits[token] >= order[-1]
    assert before < top_p + 1e-5


def test_a_seed_repeats_and_none_does_not():
    logits = torch.zeros(1000)

    def numbers(seed):
        params = SamplingParams(temperature=1.0, seed=seed)
        generator = params.generator()
        return [sample(logits, params, generator) for _ in range(8)]

    assert numbers(5) == numbers(5) != numbers(6)
    assert numbers(None) != numbers(None)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draws([0.0, 1.0], 10, temperature=1.0)
    SamplingParams(seed=None).generator()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(broken, temperature):
    params = SamplingParams(temperature=temperature)
    with pytest.raises(UserError, match="logits are not finite: its weights are damaged, or its dtype is too narrow"):
        sample(torch.tensor([0.0, broken]), params, params.generator())
