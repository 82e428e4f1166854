"""What cannot be meant is refused with its name, its value and the limits."""

import math

import pytest

from fulmen.config import UserError
from fulmen.serve.params import MAX_STOP_LENGTH, MAX_STOPS, MAX_TOKENS_NAMED, SamplingParams
from fulmen.serve.structure import Structure


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
        ({"max_tokens": 2**31}, f"max_tokens must be at most {2**31 - 1}, got {2**31}"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"temperature": math.inf}, "temperature must be 0 or more, got inf"),
        ({"temperature": "hot"}, "temperature must be 0 or more, got 'hot'"),
        ({"temperature": 10**5000}, "temperature must be 0 or more, got a number of 16610 bits"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1, got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be above 0, got inf"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2, got 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be from -2 to 2, got -2.1"),
        ({"logit_bias": {3: 101.0}}, "logit_bias of token 3 must be from -100 to 100, got 101.0"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 must be from -100 to 100, got nan"),
        ({"logit_bias": {-1: 1.0}}, "a token of logit_bias must be 0 or more, got -1"),
        ({"logit_bias": {"3": 1.0}}, "a token of logit_bias must be a whole number, got '3'"),
        ({"stop_tokens": (-1,)}, "a token of stop_tokens must be 0 or more, got -1"),
        (
            {"stop_tokens": range(MAX_TOKENS_NAMED + 1)},
            f"stop_tokens must name at most {MAX_TOKENS_NAMED} tokens, got {MAX_TOKENS_NAMED + 1}",
        ),
        ({"stop": ("a", "")}, "a stop string must not be empty"),
        ({"stop": "abc"}, "stop must be strings in a tuple, got 'abc'"),
        ({"stop": (1,)}, "stop must be strings in a tuple, got (1,)"),
        ({"stop": ("a",) * (MAX_STOPS + 1)}, f"stop must be at most {MAX_STOPS} strings, got {MAX_STOPS + 1}"),
        (
            {"stop": ("a" * (MAX_STOP_LENGTH + 1),)},
            f"a stop string must have at most {MAX_STOP_LENGTH} characters, got {MAX_STOP_LENGTH + 1}",
        ),
        ({"seed": -1}, "seed must be at least 0 and below 2**63, got -1"),
        ({"seed": 2**63}, f"seed must be at most {2**63 - 1}, got {2**63}"),
        ({"n": 0}, "n must be from 1 to 128, got 0"),
        ({"n": 129}, "n must be at most 128, got 129"),
        ({"n": None}, "n must be a whole number, got None"),
        ({"logprobs": -1}, "logprobs must be from 0 to 20, got -1"),
        ({"logprobs": 21}, "logprobs must be at most 20, got 21"),
        ({"structure": "json"}, "structure must be a Structure, got str"),
        (
            {"structure": Structure("json_object"), "ignore_eos": True},
            "structure and ignore_eos exclude each other: a complete answer ends with an end token",
        ),
    ],
)
def test_guard(settings, message):
    with pytest.raises(UserError) as caught:
        SamplingParams(**settings)
    assert str(caught.value) == message


def test_the_limits_themselves_are_allowed():
    SamplingParams(max_tokens=None, temperature=0, top_p=1, min_p=1, n=128, logprobs=20, seed=2**63 - 1, stop=["a"])
    SamplingParams(presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100, 1: 100.0}, logprobs=0)
    SamplingParams(stop=("a" * MAX_STOP_LENGTH,) * MAX_STOPS, stop_tokens=tuple(range(MAX_TOKENS_NAMED)))


def test_what_it_was_made_of_may_change():
    bias, stop = {3: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[4], stop[0] = 2.0, "b"
    assert (params.logit_bias, params.stop) == ({3: 1.0}, ("a",))
    assert hash(params) == hash(SamplingParams(logit_bias={3: 1.0}, stop=("a",)))


def test_tokens_that_a_model_has_not():
    SamplingParams(logit_bias={319: 1.0}, stop_tokens=(319,)).check_vocabulary(320)
    with pytest.raises(UserError, match="logit_bias names token 320; the model's are 0 to 319"):
        SamplingParams(logit_bias={1: 1.0, 320: 1.0}).check_vocabulary(320)
    with pytest.raises(UserError, match="stop_tokens names token 999; the model's are 0 to 319"):
        SamplingParams(stop_tokens=(999, 3)).check_vocabulary(320)
