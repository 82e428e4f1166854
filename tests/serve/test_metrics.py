"""What a service measures, with a clock that a test sets."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fulmen.serve.api.limits import HttpCounts
from fulmen.serve.metrics import Metrics
from fulmen.serve.scheduler import Scheduler, Sequence
from fulmen.serve.types import Piece


@pytest.fixture
def engine():
    scheduler = Scheduler(slots=2, pages=10, page_size=4, chunk_tokens=64, snapshots=3)
    return SimpleNamespace(scheduler=scheduler)


@pytest.fixture
def metrics(engine):
    return Metrics(engine)


@pytest.fixture
def at(monkeypatch):
    """at(3.5) sets the clock."""
    now = [0.0]
    monkeypatch.setattr("fulmen.serve.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, seconds)


def number(metrics, name, **labels):
    """None where there is no such sample."""
    return metrics.registry.get_sample_value(f"fulmen_{name}", labels)


def piece(*tokens, index=0, reason=None):
    return Piece(text="x", tokens=tokens, index=index, reason=reason, prompt_tokens=7)


def test_times_of_one_answer(metrics, at):
    at(10)
    metrics.begin(1)
    at(12)
    metrics.piece(1, piece(5))
    at(18)
    metrics.piece(1, piece(5, 6, 7))  # tokens whose text came together
    at(20)
    metrics.piece(1, piece(reason="length"))  # nothing but the end
    metrics.end(1)
    assert number(metrics, "time_to_first_token_seconds_sum") == 2
    assert number(metrics, "inter_token_latency_seconds_count") == 3
    assert number(metrics, "inter_token_latency_seconds_sum") == 6
    assert number(metrics, "inter_token_latency_seconds_bucket", le="1.0") == 0
    assert number(metrics, "inter_token_latency_seconds_bucket", le="2.5") == 3
    assert number(metrics, "request_seconds_sum") == 10
    assert number(metrics, "generated_tokens_total") == 4
    assert number(metrics, "prompt_tokens_total") == 7
    assert number(metrics, "answers_total", reason="length") == 1


def test_answers_to_one_request_have_each_their_own_times(metrics, at):
    metrics.begin(1)
    for second, index in ((1, 0), (2, 1), (4, 0), (10, 1)):
        at(second)
        metrics.piece(1, piece(5, index=index))
    assert number(metrics, "time_to_first_token_seconds_count") == 1
    assert number(metrics, "time_to_first_token_seconds_sum") == 1
    assert number(metrics, "inter_token_latency_seconds_count") == 2
    assert number(metrics, "inter_token_latency_seconds_sum") == (4 - 1) + (10 - 2)
    assert number(metrics, "prompt_tokens_total") == 7
    assert number(metrics, "generated_tokens_total") == 4


def test_what_has_ended_is_forgotten(metrics, at):
    metrics.begin(1)
    metrics.end(1)
    metrics.end(1)
    metrics.piece(1, piece(5, reason="stop"))
    assert metrics._times == {}
    assert number(metrics, "request_seconds_count") == 1
    assert number(metrics, "generated_tokens_total") == 0
    assert number(metrics, "answers_total", reason="stop") is None


def test_the_hit_rate(metrics, engine):
    assert number(metrics, "prefix_cache_hit_rate") == 0
    counts = engine.scheduler.counts
    counts.queried, counts.hit, counts.without_state, counts.preemptions = 200, 50, 30, 2
    assert number(metrics, "prefix_cache_hit_rate") == 0.25
    assert number(metrics, "prefix_cache_queried_tokens_total") == 200
    assert number(metrics, "prefix_cache_hit_tokens_total") == 50
    assert number(metrics, "prefix_cache_tokens_without_state_total") == 30
    assert number(metrics, "preemptions_total") == 2


def test_the_gauges_are_the_engines_at_the_time_of_asking(metrics, engine):
    scheduler = engine.scheduler
    sequences = [Sequence(tokens=[n] * 5, prompt_length=5) for n in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    names = ("requests_waiting", "requests_running", "pages_in_use", "pages_cached", "snapshots_in_use")

    def now():
        return [number(metrics, name) for name in names]

    assert now() == [3, 0, 0, 0, 0]
    scheduler.finish_step(scheduler.schedule())
    assert now() == [1, 2, 4, 0, 0]
    scheduler.finish(sequences[0])
    assert now() == [1, 1, 2, 2, 1]  # a whole page and a tail, and the states behind it
    assert [number(metrics, name) for name in ("slots", "pages", "snapshots")] == [2, 10, 3]
    engine.scheduler = Scheduler(slots=1, pages=6, page_size=4, chunk_tokens=64)  # as after a step that failed
    assert now() == [0] * 5
    assert [number(metrics, name) for name in ("slots", "pages", "snapshots")] == [1, 6, 0]


def test_the_text_is_what_prometheus_reads(metrics):
    metrics.begin(1)
    metrics.piece(1, piece(5, reason="stop"))
    counts = HttpCounts()
    counts.count({"method": "GET"}, 200)
    families = list(text_string_to_metric_families((counts.render() + metrics.render()).decode()))
    names = [family.name for family in families]
    assert len(set(names)) == len(names) > 20
    assert all(name.startswith("fulmen_") for name in names)
    assert all(family.documentation for family in families if not family.name.endswith("_created"))
