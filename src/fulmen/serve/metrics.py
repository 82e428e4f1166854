"""What a service measures, in Prometheus' text form (package prometheus-client)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fulmen.serve.engine import Engine
from fulmen.serve.types import Piece

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
"""Upper ends of the histograms' buckets, seconds."""


@dataclass
class Times:
    """When a request came, and when each of its answers last gave a token; seconds of `time.monotonic`."""

    arrival: float
    last: dict[int, float] = field(default_factory=dict)


class Metrics:
    """Counters and histograms of one service; its gauges are read from the engine when somebody asks."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        more = {"registry": self.registry, "namespace": "fulmen"}
        self._first = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", buckets=FIRST_TOKEN, **more
        )
        self._next = Histogram("inter_token_latency_seconds", "Between tokens of an answer", buckets=NEXT_TOKEN, **more)
        self._whole = Histogram("request_seconds", "From arrival to the end", buckets=FIRST_TOKEN, **more)
        self._ended = Counter("answers", "Answers by how they ended", ["reason"], **more)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts that were answered", **more)
        self._generated = Counter("generated_tokens", "Tokens drawn", **more)
        self._times: dict[int, Times] = {}
        self.registry.register(_EngineCollector(engine))

    def begin(self, request: int) -> None:
        """A request has come."""
        self._times[request] = Times(time.monotonic())

    def piece(self, request: int, piece: Piece) -> None:
        """A piece of its answer goes out."""
        times, now = self._times.get(request), time.monotonic()
        if times is None:
            return
        if piece.tokens:
            if not times.last:
                self._first.observe(now - times.arrival)
                self._prompt.inc(piece.prompt_tokens)
            elif piece.index in times.last:
                for _ in piece.tokens:
                    self._next.observe((now - times.last[piece.index]) / len(piece.tokens))
            times.last[piece.index] = now
            self._generated.inc(len(piece.tokens))
        if piece.reason is not None:
            self._ended.labels(piece.reason).inc()

    def end(self, request: int) -> None:
        """It has its answers, or nobody waits for them any more."""
        times = self._times.pop(request, None)
        if times is not None:
            self._whole.observe(time.monotonic() - times.arrival)

    def render(self) -> bytes:
        """All of them as text."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class _EngineCollector:
    """The engine's numbers at the time of asking."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, text, read in GAUGES:
            yield GaugeMetricFamily(f"fulmen_{name}", text, value=read(self._engine.scheduler))
        for name, text, read in COUNTERS:
            yield CounterMetricFamily(f"fulmen_{name}", text, value=read(self._engine.scheduler))


def _snapshots(scheduler, used: bool) -> int:
    if scheduler.prefix is None:
        return 0
    slots = scheduler.prefix.snapshots
    return slots.count - slots.free if used else slots.count


GAUGES: tuple[tuple[str, str, Callable], ...] = (
    ("requests_running", "Sequences that hold a slot", lambda s: len(s.running)),
    ("requests_waiting", "Sequences that wait for one", lambda s: len(s.waiting)),
    ("slots", "Places for states", lambda s: s.slots.count),
    ("pages", "Pages of keys and values", lambda s: s.pages.count),
    ("pages_in_use", "Pages that sequences hold", lambda s: s.pages.in_use),
    ("pages_cached", "Pages that only the prefix cache keeps", lambda s: s.pages.idle),
    ("snapshots", "Places for states of the prefix cache", lambda s: _snapshots(s, used=False)),
    ("snapshots_in_use", "Those that hold one", lambda s: _snapshots(s, used=True)),
    (
        "prefix_cache_hit_rate",
        "Tokens taken from the prefix cache, of those of all prompts",
        lambda s: s.counts.hit_rate,
    ),
)
COUNTERS: tuple[tuple[str, str, Callable], ...] = (
    ("prefix_cache_queried_tokens", "Tokens of prompts that looked into the prefix cache", lambda s: s.counts.queried),
    ("prefix_cache_hit_tokens", "Tokens taken from it", lambda s: s.counts.hit),
    (
        "prefix_cache_tokens_without_state",
        "Tokens whose pages it had and whose state it had not",
        lambda s: s.counts.without_state,
    ),
    ("preemptions", "Sequences that gave their pages back to wait", lambda s: s.counts.preemptions),
)
"""Name, help, and how to read it from a scheduler."""
