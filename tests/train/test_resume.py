"""A run that is killed at any moment and resumed ends as one that was left alone, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fulmen.run import SnapshotStore, read_metrics
from fulmen.train import train

SCENES = Path(__file__).with_name("kills.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def logged(run):
    """The lines of a run's metrics, without what depends on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def final_bytes(run):
    """What the run ends with: its last snapshot's tensors and state, and all of its checkpoint."""
    snapshot = run / "snapshots" / f"step-{SnapshotStore(run / 'snapshots').steps()[-1]:08d}"
    files = [snapshot / "tensors.safetensors", snapshot / "state.json", *sorted((run / "checkpoint").iterdir())]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def test_three_kills_in_200_steps(recipe, folder):
    train(recipe(), folder / "straight")
    run = folder / "killed"
    command = [sys.executable, "-m", "fulmen", "train", "recipe.toml", "--dir", str(run), "--resume"]
    generator = random.Random(0)
    begun = []
    for first_step in sorted(generator.sample(range(5, 180), 3)):
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while not any(line["step"] >= first_step for line in lines_so_far(run)):
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.003)
            time.sleep(generator.uniform(0, 0.05))
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        begun.append(lines_so_far(run)[-1]["step"])
    assert begun == sorted(set(begun))
    assert begun[-1] < 200
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert final_bytes(run) == final_bytes(folder / "straight")
    lines = logged(run)
    assert lines == logged(folder / "straight")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 201))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 50, 100, 150, 200]


def lines_so_far(run):
    return read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def test_kills_at_every_kind_of_moment(folder):
    """In the tokenizer's training, in snapshots, in the export, and at calls of the file system in turn."""
    result = subprocess.run([sys.executable, SCENES], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.split()) >= 8
    assert final_bytes(folder / "killed") == final_bytes(folder / "straight")
    assert logged(folder / "killed") == logged(folder / "straight")
    assert not list((folder / "killed").glob(".*"))
