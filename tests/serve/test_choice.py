"""Which tokens are the likeliest, and that the rows beside a row change no bit of what it gives."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fulmen.serve.choice import Settings, choose_any, choose_likely, likeliest, log_total

LOGITS = st.lists(
    st.one_of(st.floats(-100, 100, width=32), st.sampled_from([0.0, -0.0, 1.0, -math.inf])), min_size=1, max_size=20
)


def settings(rows, **given):
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "number": 0.0} | given
    return Settings(*(torch.full((rows, 1), float(defaults[name]), dtype=torch.float64) for name in Settings._fields))


@given(LOGITS, st.data())
def test_the_likeliest_in_falling_order_the_lowest_of_equals_first(logits, data):
    count = data.draw(st.integers(1, len(logits)))
    values, tokens = likeliest(torch.tensor([logits]), count)
    expected = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]
    assert tokens[0].tolist() == expected
    assert values[0].tolist() == [logits[token] for token in expected]


def test_the_logarithm_of_the_sum():
    torch.manual_seed(0)
    for vocab, tolerance in ((7, 1e-12), (4096, 1e-9), (50_000, 1e-7)):
        logits = torch.randn(3, vocab) * 8
        got = log_total(logits, logits.amax(-1, keepdim=True))
        torch.testing.assert_close(got, logits.double().logsumexp(-1, keepdim=True), rtol=0, atol=tolerance)


def test_every_number_below_one_gives_a_token_that_has_a_probability():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    best = logits.amax(-1, keepdim=True)
    for number, token in ((0.0, 1), (0.5 - 2**-53, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert choose_any(logits, best, settings(1, number=number)).item() == token
        assert choose_likely(logits, best, settings(1, number=number), 5)[0].item() == token


def test_top_p_beyond_the_candidates_is_told():
    logits = torch.zeros(1, 10)
    for count, enough in ((3, False), (4, True), (10, True)):
        given = settings(1, top_p=0.35, number=0.99)
        token, is_enough = choose_likely(logits, torch.zeros(1, 1), given, count)
        assert is_enough.item() is enough
        assert token.item() == min(count, 4) - 1
    # With a top-k the rest does not count.
    assert choose_likely(logits, torch.zeros(1, 1), settings(1, top_k=2, top_p=0.9, number=0.99), 3)[1].item()


def test_rows_do_not_see_each_other():
    torch.manual_seed(1)
    logits = torch.randn(37, 1003) * 3
    best = logits.amax(-1, keepdim=True)
    totals = log_total(logits, best)
    for row in range(37):
        assert torch.equal(log_total(logits[row : row + 1].clone(), best[row : row + 1]), totals[row : row + 1])
