"""Learning rates and batch sizes, by hand and as properties of any schedule."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulmen.train.recipe import ScheduleSection, TokenScheduleSection
from fulmen.train.schedule import batch_tokens, learning_rate_factor


def factors(**settings):
    schedule = ScheduleSection(**settings)
    return [learning_rate_factor(schedule, step) for step in range(schedule.steps)]


def test_linear_decay_by_hand():
    got = factors(steps=9, warmup=4, decay=2, decay_shape="linear", final=0.5)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5])


def test_exponential_decay_by_hand():
    assert factors(steps=5, warmup=0, decay=3, final=0.125) == pytest.approx([1, 1, 0.5, 0.25, 0.125])


def test_without_warmup_and_decay_it_is_constant():
    assert factors(steps=3, warmup=0) == [1, 1, 1]


@st.composite
def schedules(draw):
    warmup, stable, decay = (draw(st.integers(0, 50)) for _ in range(3))
    return ScheduleSection(
        steps=max(1, warmup + stable + decay),
        warmup=warmup,
        decay=decay,
        decay_shape=draw(st.sampled_from(("exponential", "linear"))),
        final=draw(st.floats(1e-3, 1)),
    )


@given(schedules())
def test_rises_stays_and_falls_without_a_jump(schedule):
    got = [learning_rate_factor(schedule, step) for step in range(schedule.steps)]
    assert all(0 < factor <= 1 for factor in got)
    rise, fall = got[: schedule.warmup], got[schedule.steps - schedule.decay :]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert set(got[schedule.warmup : schedule.steps - schedule.decay]) <= {1.0}
    assert fall[-1:] == [pytest.approx(schedule.final)][: len(fall)]
    # No step is larger than the steepest of its part: 1/warmup up, the first of the decay down.
    first_down = 1 - (schedule.final ** (1 / schedule.decay) if schedule.decay else 1)
    steepest = max(1 / max(1, schedule.warmup), first_down, (1 - schedule.final) / max(1, schedule.decay))
    assert all(abs(a - b) <= steepest + 1e-9 for a, b in pairwise(got))


def test_batches_grow_where_the_ramp_says():
    schedule = TokenScheduleSection(steps=1, warmup=0, batch_tokens=10, ramp=((100, 20), (300, 5)))
    assert [batch_tokens(schedule, seen) for seen in (0, 99, 100, 299, 300, 10**12)] == [10, 10, 20, 20, 5, 5]
    assert batch_tokens(TokenScheduleSection(steps=1, warmup=0, batch_tokens=10), 10**12) == 10
