"""`fulmen train` and `fulmen quickstart`: recipes, signals, full disks, two at once."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tests.cli.commands import TINY, assert_refused, files, on_terminal, overrides

from fulmen.cli import _parser
from fulmen.run import RunDirectory, SnapshotStore
from fulmen.train import Trainer


class TestTrain:
    def test_trains_and_says_where(self, fulmen, folder):
        code, out, err = fulmen("train", "recipe.toml")
        assert (code, err) == (0, "")
        assert "step 0: held-out" in out
        assert "train  6/6 (100%)" in out
        assert out.endswith("checkpoint: runs/recipe/checkpoint\nloss plot:  runs/recipe/plots/loss.png\n")
        assert (folder / "runs/recipe/plots/loss.png").read_bytes().startswith(b"\x89PNG")

    def test_a_folder_is_trained_in_once(self, fulmen, finished):
        recipe = finished.parent / "recipe.toml"
        assert_refused(fulmen("train", recipe, "--dir", finished), "already holds a run: add --resume to go on")
        assert_refused(
            fulmen("train", recipe, "--dir", finished, "--resume", "--set", "train.seed=3"),
            "was begun with train.seed = 0, the recipe now says 3: change it back, or choose another --dir",
        )
        with RunDirectory(finished):
            assert_refused(
                fulmen("train", recipe, "--dir", finished, "--resume"), f"is in use by process {os.getpid()}"
            )

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_stops_it_and_the_command_it_prints_goes_on(self, fulmen, folder, monkeypatch, number):
        with monkeypatch.context() as patch:
            real = Trainer.train_step

            def train_step(self, **options):
                if self.step + 1 == 3:
                    os.kill(os.getpid(), number)
                return real(self, **options)

            patch.setattr(Trainer, "train_step", train_step)
            code, out, err = fulmen("train", "recipe.toml", "--dir", "my run", "--set", "schedule.steps=5")
        assert (code, err) == (128 + number, "")
        said, command = out.splitlines()[-2:]
        assert said == "stopped at step 3 of 5, snapshot saved; go on with"
        assert command == "  fulmen train 'my run/recipe.toml' --dir 'my run' --resume"
        assert_refused(fulmen("generate", "my run", "-p", "x"), "is a training run that has not ended")
        assert_refused(fulmen("info", "my run"), "is a training run that has not ended")
        code, out, err = fulmen(*shlex.split(command)[1:])
        assert (code, err) == (0, "")
        assert "checkpoint: my run/checkpoint" in out

    def test_ctrl_c_before_the_first_step(self, fulmen, folder, monkeypatch):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("fulmen.train.models.Tokenizer.train", interrupt)
        code, _, err = fulmen("train", "recipe.toml", "--dir", "run")
        assert (code, err) == (130, "fulmen: interrupted\n")
        assert not (folder / "run").exists()

    def test_divergence_is_one_line_and_exit_code_1(self, fulmen, folder):
        settings = ("optimizer.learning_rate=1e30", "train.snapshot_every=1")
        code, out, err = fulmen("train", "recipe.toml", "--dir", "run", *overrides(settings))
        assert code == 1
        assert re.fullmatch(
            r"fulmen: error: training diverged at step 2: loss \S+, balance \S+, gradient norm \S+, learning rate "
            r"1e\+30.*; the last good snapshot is run/snapshots/step-00000001; a run with a lower .*\n",
            err,
        ), err
        assert "checkpoint:" not in out

    def test_a_disk_that_fills_up_while_saving(self, fulmen, folder):
        """RLIMIT_FSIZE makes writes fail in the midst, as a full disk does."""
        fulmen("train", "recipe.toml", "--dir", "straight")
        fulmen("train", "recipe.toml", "--dir", "run", "--set", "schedule.steps=2")
        before = {path: path.read_bytes() for path in (folder / "run" / "snapshots").rglob("*") if path.is_file()}
        script = (
            "import resource, sys; from fulmen.cli import main; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)); main(sys.argv[1:])"
        )
        command = [sys.executable, "-c", script, "train", "recipe.toml", "--dir", "run", "--resume"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert_refused(
            (result.returncode, result.stdout, result.stderr),
            "cannot save the snapshot of step 4 in run/snapshots: File too large",
            "run/snapshots/step-00000002 is intact",
        )
        after = {path: path.read_bytes() for path in (folder / "run" / "snapshots").rglob("*") if path.is_file()}
        assert after == before
        assert fulmen("train", "recipe.toml", "--dir", "run", "--resume")[0] == 0
        one, other = (SnapshotStore(folder / name / "snapshots").load(6).tensors() for name in ("straight", "run"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_a_disk_that_fills_up_in_the_export(self, fulmen, folder):
        arguments = ("train", "recipe.toml", "--dir", "run")
        fulmen(*arguments)
        shutil.rmtree(folder / "run" / "checkpoint")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            result = fulmen(*arguments, "--resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_refused(result, "cannot write the checkpoint", "File too large")
        assert not [name for name in files(folder / "run") if "checkpoint" in name]
        assert fulmen(*arguments, "--resume")[0] == 0

    def test_on_a_terminal(self, folder):
        """A bar; Ctrl-C ends the step, saves, and says how to go on."""
        settings = ("schedule.steps=100000", "train.snapshot_every=50000")
        code, shown = on_terminal(
            ["train", "recipe.toml", "--dir", "run", *overrides(settings)], [(b"loss ", b"\x03")], width=100
        )
        assert code == 128 + signal.SIGINT
        assert "100000" in shown
        stopped = re.search(r"stopped at step (\d+) of 100000, snapshot saved; go on with", shown)
        assert SnapshotStore(folder / "run" / "snapshots").steps() == [int(stopped[1])]
        assert "Traceback" not in shown
        # The cursor that the bar hid is back.
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


class TestQuickstart:
    def test_trains_shows_and_says_what_is_next(self, fulmen, folder):
        code, out, err = fulmen("quickstart", "--dir", "quick", *overrides(TINY))
        assert (code, err) == (0, "")
        assert re.search(r"Held-out text: \d\.\d\d bits per byte before training, \d\.\d\d after\.", out)
        assert out.count("--- it continues ") == 3
        assert "--- asked: Return the number of items in the list. ---" in out
        for next_one in ("fulmen chat quick", "fulmen generate quick --prompt 'import '", "fulmen info quick"):
            _parser().parse_args(shlex.split(next_one)[1:])
            assert f"  {next_one}" in out
        assert json.loads((folder / "quick/checkpoint/config.json").read_text())["model_type"] == "minimax"
        # A second time it only shows.
        before = (folder / "quick/metrics.jsonl").stat().st_mtime_ns
        code, again, _ = fulmen("quickstart", "--dir", "quick")
        assert code == 0
        assert again.startswith("quick holds a trained model; delete the folder to train it anew.\n")
        assert again[again.index("\nHeld-out") :] == out[out.index("\nHeld-out") :]
        assert (folder / "quick/metrics.jsonl").stat().st_mtime_ns == before

    def test_goes_on_where_it_was_broken_off(self, fulmen, folder, monkeypatch):
        with monkeypatch.context() as patch:
            real = Trainer.train_step
            patch.setattr(
                Trainer,
                "train_step",
                lambda self, **options: os.kill(os.getpid(), signal.SIGINT) or real(self, **options),
            )
            code, out, _ = fulmen("quickstart", "--dir", "quick", *overrides(TINY))
        assert code == 130
        assert "stopped at step 1 of 3" in out
        code, out, _ = fulmen("quickstart", "--dir", "quick", *overrides(TINY))
        assert code == 0
        assert "step 0:" not in out
        assert "train  3/3 (100%)" in out

    def test_without_held_out_text(self, fulmen, folder):
        code, out, err = fulmen("quickstart", "--dir", "quick", *overrides([*TINY, "data.held_out=0"]))
        assert (code, err) == (0, "")
        assert "Held-out text" not in out
