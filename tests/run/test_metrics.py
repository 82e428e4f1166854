"""A metrics file reads as one uninterrupted run, however often the run was."""

import json
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fulmen.config import UserError
from fulmen.run.directory import RunDirectory
from fulmen.run.metrics import MetricsLog, read_metrics


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def curve(run, name):
    events = EventAccumulator(str(run.tensorboard)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_lines_and_curves(run):
    with MetricsLog(run, resume_step=None) as log:
        log.log(1, loss=2.5, tokens=1024, load=[torch.tensor(0.25), np.float32(0.75)], done=True)
        log.log(1, **{"held_out/loss": torch.tensor(2.75)})
        log.log(2, loss=np.float64(1.5), tokens=2048, load=torch.tensor([[1.0], [2.0]]))
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "tokens": 1024, "load": [0.25, 0.75], "done": True},
        {"step": 1, "held_out/loss": 2.75},
        {"step": 2, "loss": 1.5, "tokens": 2048, "load": [[1.0], [2.0]]},
    ]
    assert curve(run, "loss") == [(1, 2.5), (2, 1.5)]
    assert curve(run, "load/1") == [(1, 0.75)]
    assert curve(run, "load/1/0") == [(2, 2.0)]
    assert curve(run, "held_out/loss") == [(1, 2.75)]


def test_line_is_readable_as_soon_as_it_is_logged(run):
    with MetricsLog(run, resume_step=None) as log:
        log.log(1, loss=2.5)
        assert read_metrics(run.metrics) == [{"step": 1, "loss": 2.5}]
        assert curve(run, "loss") == [(1, 2.5)]


def test_non_finite_numbers_are_null_in_the_file_and_nan_when_read(run):
    with MetricsLog(run, resume_step=None) as log:
        log.log(1, loss=math.nan, load=[math.inf, torch.tensor(-math.inf).item(), 1.0])
    assert run.metrics.read_text() == '{"step": 1, "loss": null, "load": [null, null, 1.0]}\n'
    (record,) = read_metrics(run.metrics)
    assert math.isnan(record["loss"])
    np.testing.assert_array_equal(record["load"], [math.nan, math.nan, 1.0])


def test_resumed_file_equals_that_of_an_uninterrupted_run(run):
    def train(first, last, resume_step):
        with MetricsLog(run, resume_step=resume_step) as log:
            for step in range(first, last + 1):
                log.log(step, loss=1 / step)

    train(1, 7, None)
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    # The snapshot was of step 4: what came after it is done again.
    train(5, 10, 4)
    expected = [(step, 1 / step) for step in range(1, 11)]
    assert [(record["step"], record["loss"]) for record in read_metrics(run.metrics)] == expected
    steps, values = zip(*curve(run, "loss"), strict=True)
    assert steps == tuple(range(1, 11))
    assert values == pytest.approx([value for _, value in expected])


def test_run_from_the_beginning_drops_what_was_logged(run):
    with MetricsLog(run, resume_step=None) as log:
        log.log(0, loss=1.0)
    with MetricsLog(run, resume_step=None) as log:
        log.log(0, loss=2.0)
    assert read_metrics(run.metrics) == [{"step": 0, "loss": 2.0}]
    assert curve(run, "loss") == [(0, 2.0)]


def test_resuming_at_step_zero_keeps_step_zero(run):
    with MetricsLog(run, resume_step=None) as log:
        log.log(0, loss=1.0)
        log.log(1, loss=0.5)
    with MetricsLog(run, resume_step=0):
        pass
    assert read_metrics(run.metrics) == [{"step": 0, "loss": 1.0}]


def test_half_written_last_line_is_not_read(run):
    run.path.mkdir()
    run.metrics.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_metrics(run.metrics) == [{"step": 1}]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "x"}', "3"])
def test_bad_line_is_named(run, line):
    run.path.mkdir()
    run.metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
        read_metrics(run.metrics)


def test_missing_file(run):
    with pytest.raises(UserError, match=r"cannot read metrics .*: No such file"):
        read_metrics(run.metrics)


def test_full_disk_is_one_line(run, monkeypatch):
    class Full:
        def refuse(self, *data):
            raise OSError(28, "No space left on device")

        write = flush = close = refuse

    log = MetricsLog(run, resume_step=None)
    monkeypatch.setattr(log, "_file", Full())
    for call in (lambda: log.log(1, loss=1.0), log.flush, log.close):
        with pytest.raises(UserError, match=r"cannot write metrics to .*run: No space left on device"):
            call()


def test_folder_that_cannot_be_written(run):
    run.path.mkdir()
    run.tensorboard.touch()
    with pytest.raises(UserError, match="cannot write metrics to"):
        MetricsLog(run, resume_step=None)
