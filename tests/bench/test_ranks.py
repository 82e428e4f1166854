"""What benchmarks over ranks keep: every part with the commit that it was measured at, of the same ranks alone."""

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MACHINE = {"ranks": 4, "link": None, "gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "a1", "time": "today"}


@pytest.fixture
def keep(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import parallel

    return parallel.keep


def test_parts_measured_one_after_the_other(keep, tmp_path):
    path = tmp_path / "results.json"
    keep(path, MACHINE, "check", [1])
    later = MACHINE | {"commit": "b2", "time": "tomorrow"}
    keep(path, later, "lengths", [2])
    kept = json.loads(path.read_text())
    assert (kept["check"], kept["lengths"], kept["machine"]) == ([1], [2], later)
    assert {part: run["commit"] for part, run in kept["runs"].items()} == {"check": "a1", "lengths": "b2"}
    # Of other ranks nothing is left to be taken for theirs.
    keep(path, later | {"ranks": 8}, "check", [3])
    kept = json.loads(path.read_text())
    assert (kept["check"], list(kept["runs"])) == ([3], ["check"])
    assert "lengths" not in kept
