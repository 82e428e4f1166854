"""Drawing tokens: what can be drawn, how often, that a seed repeats it, and that no row sees another."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fulmen.serve import sampling
from fulmen.serve.sampling import Draw, SamplingParams, sample

LOGITS = st.lists(st.one_of(st.floats(-12, 12, width=32), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12)


def log(*probabilities):
    return [math.log(p) for p in probabilities]


def row(*logits):
    return torch.tensor([logits], dtype=torch.float32)


def draws(logits, count=2000, **settings):
    """How often each token is drawn by one answer from these logits."""
    draw = Draw(SamplingParams(**{"seed": 0, "temperature": 1.0} | settings), ())
    return Counter(sample(torch.tensor([logits]), [draw])[0].token for _ in range(count))


class Even(Draw):
    """A draw whose random number is given."""

    def __init__(self, params, number):
        super().__init__(params, ())
        self._number = number

    def next_number(self):
        return self._number


def shares(logits, count, **settings):
    """The part of evenly spaced numbers that gives each token: its probability, up to 1 / count."""
    params = SamplingParams(**settings)
    answers = [Even(params, (place + 0.5) / count) for place in range(count)]
    drawn = Counter(one.token for one in sample(torch.tensor([logits]).expand(count, -1), answers))
    return {token: times / count for token, times in drawn.items()}


def naive(logits, temperature, top_k, top_p, min_p):
    """The probabilities after temperature, top-k, top-p and min-p, one step after the other.

    And how far off the nearest edge is that rounding could move a token over.
    """
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    kept = order[: top_k or None]
    total, reached, nucleus, margins = math.fsum(weights[token] for token in kept), 0.0, [], [1.0]
    for token in kept:
        if nucleus:
            margins.append(abs(reached - top_p * total))
            if reached >= top_p * total:
                break
        nucleus.append(token)
        reached += weights[token]
    margins += [abs(weights[token] - min_p) for token in nucleus if weights[token] != 1]
    left = [token for token in nucleus if weights[token] >= min_p]
    total = math.fsum(weights[token] for token in left)
    return {token: weights[token] / total for token in left}, min(margins)


def test_greedy_takes_the_likeliest():
    assert draws([0.1, 3.0, 2.9], 20, temperature=0) == {1: 20}
    assert draws([0.1, 3.0, 2.9], 20, temperature=0, top_k=2, top_p=0.1, min_p=0.5) == {1: 20}


def test_greedy_takes_the_lowest_of_equals():
    for width in (5, 64, 1000):
        logits = torch.zeros(3, width)
        logits[1, [2, 4]] = 1.0
        logits[2, 1:] = -0.0
        answers = [Draw(SamplingParams(temperature=0), ()) for _ in range(3)]
        assert [one.token for one in sample(logits, answers)] == [0, 2, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"top_k": 4, "top_p": 0.95, "min_p": 0.05, "temperature": 1.5},
    ],
)
def test_frequencies_follow_the_probabilities(settings):
    logits = log(0.08, 0.3, 0.02, 0.2, 0.4)
    counts = draws(logits, 8000, **settings)
    expected, _ = naive(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings)
    assert set(counts) == set(expected)
    tokens = sorted(expected)
    if len(tokens) > 1:
        assert chisquare([counts[t] for t in tokens], [8000 * expected[t] for t in tokens]).pvalue > 1e-3


@given(LOGITS, st.integers(0, 13), st.floats(1e-6, 1), st.one_of(st.just(0.0), st.floats(0, 1)), st.floats(0.05, 10))
def test_shares_are_those_of_the_naive_way(logits, top_k, top_p, min_p, temperature):
    expected, margin = naive(logits, temperature, top_k, top_p, min_p)
    assume(margin > 1e-9)
    got = shares(logits, 97, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(got) <= set(expected)
    # An interval of the unit's length p holds p * 97 of the numbers, one more or less.
    assert all(abs(got.get(token, 0.0) - share) <= 1 / 97 + 1e-9 for token, share in expected.items())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-50, 5e-324])
def test_the_coldest_temperatures_are_greedy(temperature):
    assert draws([1.0, 2.0, -50.0, 1.5], 100, temperature=temperature) == {1: 100}
    # Exactly tied, both are as likely as before.
    assert set(draws([1.0, 1.0, 0.0], 100, temperature=temperature)) == {0, 1}


def test_the_hottest_temperature_forgets_the_logits():
    assert shares([0.0, 50.0, -50.0, 10.0], 100, temperature=1e30) == {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}


def test_top_k():
    assert set(draws([1.0, 4.0, 3.0, 2.0], 300, temperature=5.0, top_k=2)) == {1, 2}
    assert set(draws([1.0, 4.0, 3.0, 2.0], 300, temperature=5.0, top_k=1)) == {1}
    assert set(draws([1.0, 4.0, 3.0, 2.0], 300, temperature=5.0, top_k=99)) == {0, 1, 2, 3}
    assert set(draws([1.0, 1.0, 1.0, 1.0], 300, top_k=3)) == {0, 1, 2}


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
    assert set(shares(log(0.3, 0.05, 0.5, 0.15), 200, temperature=1.0, top_p=top_p)) == expected


def test_top_p_among_equals_keeps_just_enough_and_the_lowest():
    assert set(shares([0.0] * 10, 100, temperature=1.0, top_p=0.35)) == {0, 1, 2, 3}
    assert set(shares([0.0] * 8, 100, temperature=1.0, top_p=0.25)) == {0, 1}


def test_top_p_counts_within_top_k():
    """Of (0.5, 0.3 | 0.2) the first is 0.625 of the two that top-k leaves."""
    assert set(shares(log(0.5, 0.3, 0.2), 100, temperature=1.0, top_k=2, top_p=0.6)) == {0}
    assert set(shares(log(0.5, 0.3, 0.2), 100, temperature=1.0, top_p=0.6)) == {0, 1}


def test_min_p_is_a_part_of_the_likeliest_after_temperature():
    assert set(shares(log(0.5, 0.3, 0.2), 100, temperature=1.0, min_p=0.5)) == {0, 1}
    assert set(shares(log(0.5, 0.3, 0.2), 100, temperature=4.0, min_p=0.5)) == {0, 1, 2}
    assert set(shares([1.0, 1.0, 0.9], 100, temperature=1.0, min_p=1.0)) == {0, 1}


def test_top_p_beyond_the_candidates_looks_at_all(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(200, 50)
    settings = [{"top_p": 0.99}, {"top_p": 0.01}, {"top_k": 9, "top_p": 0.9}, {}]
    answers = [
        [SamplingParams(seed=place, logprobs=2, **settings[place % 4]) for place in range(200)] for _ in range(2)
    ]
    expected = sample(logits, [Draw(params, ()) for params in answers[0]])
    monkeypatch.setattr(sampling, "NUCLEUS", 4)
    assert sample(logits, [Draw(params, ()) for params in answers[1]]) == expected


class TestBeforeTheDraw:
    def logprobs_left(self, logits, params, prompt=(), answer=()):
        """What a temperature of 1 makes of the logits that are drawn from: ratios of the tokens' shares."""
        draw = Draw(params, prompt)
        for token in answer:
            draw.advance(token)
        return sampling._processed(row(*logits), [draw])[0].tolist()

    def test_bias_is_added(self):
        params = SamplingParams(logit_bias={1: 100, 2: -100.0})
        assert self.logprobs_left([1.0, 2.0, 3.0], params) == [1.0, 102.0, -97.0]

    def test_repetition_divides_or_multiplies_once_what_prompt_or_answer_hold(self):
        params = SamplingParams(repetition_penalty=2.0)
        got = self.logprobs_left([4.0, -4.0, 4.0, -4.0, 4.0, 0.0], params, prompt=[0, 0, 1], answer=[0, 2, 3, 3, 5])
        assert got == [2.0, -8.0, 2.0, -8.0, 4.0, 0.0]

    def test_presence_once_and_frequency_each_time_of_the_answer_only(self):
        params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
        got = self.logprobs_left([1.0, 1.0, 1.0, 1.0], params, prompt=[0, 0, 1], answer=[1, 2, 2])
        assert got == [1.0, 1.0 - 0.75, 1.0 - 1.0, 1.0]
        assert self.logprobs_left([1.0, 1.0], SamplingParams(presence_penalty=-2), answer=[1]) == [1.0, 3.0]

    def test_bias_then_repetition_then_presence(self):
        params = SamplingParams(logit_bias={0: 3.0, 1: -3}, repetition_penalty=2.0, presence_penalty=1.0)
        assert self.logprobs_left([1.0, 1.0, 1.0], params, prompt=[2], answer=[0, 1]) == [1.0, -5.0, 0.5]

    @given(st.lists(st.integers(0, 40), max_size=60), st.lists(st.integers(0, 40), max_size=60))
    def test_counts(self, prompt, answer):
        params = SamplingParams(repetition_penalty=1.5, presence_penalty=1, frequency_penalty=0.5)
        got = self.logprobs_left([6.0] * 41, params, prompt, answer)
        for token in range(41):
            times = answer.count(token)
            expected = (4.0 if token in prompt or times else 6.0) - bool(times) - 0.5 * times
            assert got[token] == expected

    def test_penalties_work_while_drawing(self):
        draw = Draw(SamplingParams(temperature=0, frequency_penalty=1.0), [2, 2, 2])
        assert [sample(row(-9.0, 2.5, 2.0), [draw])[0].token for _ in range(6)] == [1, 2, 1, 2, 1, 2]

    def test_the_logits_are_left_as_they_were(self):
        logits = row(1.0, 2.0)
        sample(logits, [Draw(SamplingParams(logit_bias={0: 5.0}), ())])
        assert logits.tolist() == [[1.0, 2.0]]

    def test_tokens_that_the_model_has_not_do_not_touch_the_next_row(self):
        params = SamplingParams(temperature=0, logit_bias={2: 100.0}, repetition_penalty=9.0)
        answers = [Draw(params, [2, 3]), Draw(SamplingParams(temperature=0), ())]
        assert [one.token for one in sample(torch.tensor([[0.0, 1.0], [1.0, 2.0]]), answers)] == [1, 1]


class TestLogprobs:
    def test_are_those_of_the_model_itself(self):
        params = SamplingParams(
            temperature=0.1, top_k=1, logit_bias={2: 100}, repetition_penalty=3.0, logprobs=2, presence_penalty=1
        )
        drawn = sample(row(*log(0.5, 0.2, 0.3)), [Draw(params, [0, 1])])[0]
        assert (drawn.token, drawn.logprobs.token) == (2, 2)
        assert drawn.logprobs.logprob == pytest.approx(math.log(0.3), abs=1e-6)
        assert [token for token, _ in drawn.logprobs.top] == [0, 2]
        assert [value for _, value in drawn.logprobs.top] == pytest.approx(log(0.5, 0.3), abs=1e-6)

    def test_each_row_has_as_many_as_it_wants(self):
        wanted = [None, 0, 3, 20]
        answers = [Draw(SamplingParams(temperature=0, logprobs=count), ()) for count in wanted]
        drawn = sample(torch.arange(5.0).expand(4, 5), answers)
        assert [one.logprobs and len(one.logprobs.top) for one in drawn] == [None, 0, 3, 5]
        assert [token for token, _ in drawn[2].logprobs.top] == [4, 3, 2]
        assert drawn[1].logprobs.logprob == drawn[3].logprobs.logprob == drawn[3].logprobs.top[0][1]

    def test_what_the_model_rules_out_is_no_alternative(self):
        drawn = sample(row(0.0, -math.inf, 0.0), [Draw(SamplingParams(temperature=0, logprobs=3), ())])[0]
        assert [token for token, _ in drawn.logprobs.top] == [0, 2]

    def test_against_log_softmax(self):
        torch.manual_seed(0)
        logits = torch.randn(9, 3000) * 5
        answers = [Draw(SamplingParams(seed=place, logprobs=20), ()) for place in range(9)]
        expected = logits.double().log_softmax(-1)
        for place, drawn in enumerate(sample(logits, answers)):
            assert drawn.logprobs.logprob == pytest.approx(expected[place, drawn.token].item(), abs=1e-8)
            top = expected[place].topk(20)
            assert [token for token, _ in drawn.logprobs.top] == top.indices.tolist()
            assert [value for _, value in drawn.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-8)


class TestStreams:
    def tokens(self, seed, index=0, count=8, **settings):
        draw = Draw(SamplingParams(temperature=1.0, seed=seed, **settings), (), index=index)
        return [sample(torch.zeros(1, 1000), [draw])[0].token for _ in range(count)]

    def test_a_seed_repeats_and_none_does_not(self):
        assert self.tokens(5) == self.tokens(5) != self.tokens(6)
        assert self.tokens(None) != self.tokens(None)

    def test_each_of_n_answers_has_its_own(self):
        assert self.tokens(5, index=1) == self.tokens(6) != self.tokens(5)
        assert self.tokens(2**63 - 1, index=127)

    def test_a_draw_goes_on_where_it_was(self):
        """Set aside in between, and beside others that come and go, one number is used per token."""
        draw = Draw(SamplingParams(temperature=1.0, seed=5), ())
        others = [Draw(SamplingParams(temperature=1.0, seed=seed), ()) for seed in range(3)]
        got = [sample(torch.zeros(1 + place % 4, 1000), [*others[: place % 4], draw])[-1].token for place in range(8)]
        assert got == self.tokens(5)

    def test_the_global_generators_are_left_alone(self):
        import random

        before = torch.get_rng_state(), random.getstate()
        self.tokens(None)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 7, 500]),
        "top_p": st.sampled_from([1.0, 0.9, 0.2]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "logit_bias": st.sampled_from([{}, {3: 2.0}]),
        "logprobs": st.sampled_from([None, 0, 4]),
    }
)


@given(st.lists(SETTINGS, min_size=1, max_size=9), st.integers(0, 2**20), st.sampled_from([5, 333, 1000]))
def test_a_row_gives_the_same_alone_and_in_a_batch(settings, seed, vocab):
    """Token and logarithms, to the last bit, over several steps."""
    logits = (torch.randn(2, len(settings), vocab, generator=torch.Generator().manual_seed(seed)) * 4).round(decimals=1)

    def answers():
        return [Draw(SamplingParams(seed=seed + place, **one), [1, 2, 3]) for place, one in enumerate(settings)]

    together, alone = answers(), answers()
    for step in logits:
        expected = sample(step, together)
        assert [sample(step[place : place + 1].clone(), [draw])[0] for place, draw in enumerate(alone)] == expected


class TestBrokenRows:
    @pytest.mark.parametrize("broken", [[math.nan, 0.0, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
    @pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_p": 0.5}, {"top_k": 2}, {"logprobs": 2}, {}])
    def test_end_themselves_alone(self, broken, settings):
        for extra in ({}, {"logit_bias": {0: 1.0}}):
            answers = [Draw(SamplingParams(seed=1, **settings, **extra), ()) for _ in range(3)]
            alone = Draw(SamplingParams(seed=1, **settings, **extra), ())
            good = [0.3, 0.1, 0.2]
            drawn = sample(torch.tensor([good, broken, good]), answers)
            assert drawn[1] == (None, None, sampling.NOT_FINITE)
            assert drawn[0] == drawn[2] == sample(torch.tensor([good]), [alone])[0]

    def test_a_token_that_the_model_rules_out_is_never_drawn(self):
        assert set(draws([0.0, -math.inf, 0.0], 200)) == {0, 2}
        assert draws([-math.inf, -5.0], 10, temperature=0) == {1: 10}

    def test_settings_that_leave_nothing(self):
        params = SamplingParams(temperature=0, repetition_penalty=1e-45)
        answers = [Draw(params, [0]), Draw(params, [])]
        assert [one.error for one in sample(torch.ones(2, 2), answers)] == [sampling.NOTHING_LEFT, None]


def test_no_rows():
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_a_cpu_draws():
    """Also alone as in a batch. Its CPU twin is test_a_row_gives_the_same_alone_and_in_a_batch."""
    torch.manual_seed(0)
    logits = (torch.randn(48, 50_000) * 4).round(decimals=2)
    kinds = [{"temperature": 0}, {}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.9999}, {"min_p": 0.1}]
    extra = [{}, {"logprobs": 5}, {"repetition_penalty": 1.2, "logit_bias": {5: 3.0}}]

    def answers():
        return [
            Draw(SamplingParams(seed=place, **kinds[place % 6], **extra[place % 3]), range(100)) for place in range(48)
        ]

    expected = sample(logits, answers())
    there = logits.cuda()
    got = sample(there, answers())
    assert [one.token for one in got] == [one.token for one in expected]
    assert [sample(there[place : place + 1], [draw])[0] for place, draw in enumerate(answers())] == got
