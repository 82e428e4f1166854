"""The command as a person meets it: exit codes, one line for what they can mend, nothing half-written."""

import contextlib
import io
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fulmen.cli import _parser, main, serving
from fulmen.run import RunDirectory, SnapshotStore
from fulmen.serve.sampling import Drawn
from fulmen.train import Trainer

RECIPE = """
[model]
preset = "tiny"
vocab_size = 290
hidden_size = 32
num_layers = 2
layer_plan = "LS"
num_heads = 2
num_kv_heads = 1
head_dim = 16
num_experts = 4
expert_size = 32
rotary_dim = 16
max_positions = 128

[data]
sources = ["text.txt"]
sequence_length = 32
held_out_tokens = 64

[schedule]
steps = 6
warmup = 1
batch_tokens = 32

[train]
precision = "float32"
snapshot_every = 2
"""
TEXT = "A state decays, keys and values stay.\nThe decay of a state is the same for all keys and values.\n" * 20
# The shipped recipe at the size of the one above.
TINY = [
    *("model.vocab_size=290", "model.hidden_size=32", "model.num_layers=2", "model.layer_plan=LS", "model.num_heads=2"),
    *(
        "model.num_kv_heads=1",
        "model.head_dim=16",
        "model.rotary_dim=16",
        "model.num_experts=4",
        "model.expert_size=32",
    ),
    *("data.sources=['text.txt']", "data.sequence_length=32", "data.held_out_tokens=64"),
    *("schedule.steps=3", "schedule.warmup=1", "schedule.decay=1", "schedule.batch_tokens=32"),
]
VERBS = ("quickstart", "train", "generate", "chat", "serve", "plan", "info", "convert", "make-tiny")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a small recipe and its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    (folder / "recipe.toml").write_text(RECIPE.replace("text.txt", str(folder / "text.txt")))
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        main(["train", str(folder / "recipe.toml"), "--dir", str(folder / "run")])
    assert not end.value.code
    return folder / "run"


@pytest.fixture
def stdin(monkeypatch):
    """stdin(b"...") is what the command then reads."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def assert_refused(result, *parts):
    code, out, err = result
    assert code == 2, (code, out, err)
    assert re.fullmatch(r"fulmen( [a-z-]+)?: error: [^\n]+\n", err), err
    for part in parts:
        assert part in err
    return out


def overrides(settings):
    return [word for setting in settings for word in ("--set", setting)]


def start(*arguments, **options):
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    # Where it is set, nothing is ever left in a buffer.
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen([sys.executable, "-m", "fulmen", *map(str, arguments)], env=environment, **options)


class TestArguments:
    @pytest.mark.parametrize("verb", VERBS)
    def test_help_has_an_example_that_parses(self, fulmen, verb):
        code, out, err = fulmen(verb, "--help")
        assert (code, err) == (0, "")
        example = out.split("example:\n")[1].strip()
        assert "\n" not in example
        program, *arguments = shlex.split(example)
        assert (program, arguments[0]) == ("fulmen", verb)
        _parser().parse_args(arguments)

    def test_help_names_every_verb(self, fulmen):
        code, out, _ = fulmen("--help")
        assert code == 0
        assert all(re.search(rf"^ +{verb} +\w", out, re.MULTILINE) for verb in VERBS)

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ("", "the following arguments are required: VERB"),
            ("trian x", "invalid choice: 'trian'"),
            ("train", "the following arguments are required: recipe"),
            ("train recipe.toml --steps 3", "unrecognized arguments: --steps 3"),
            ("generate run --max-tokens many", "argument --max-tokens: invalid int value: 'many'"),
            ("generate run -p x --dtype int4", "argument --dtype: invalid choice: 'int4'"),
            ("generate run -p x --max-tokens 0", "max_tokens must be at least 1, got 0"),
            ("generate run -p x --temperature -1", "temperature must be 0 or more, got -1.0"),
            ("generate run -p x --temperature nan", "temperature must be 0 or more, got nan"),
            ("generate run -p x --top-k -1", "top_k must be 0 or more, got -1"),
            ("generate run -p x --top-p 1.5", "top_p must be above 0 and at most 1, got 1.5"),
            ("generate run -p x --stop ''", "a stop string must not be empty"),
            ("generate run -p x --seed -1", "seed must be at least 0"),
            ("generate run -p x --device gpu", "device 'gpu' cannot be used here"),
            ("generate run -p x", "there is no config.json in run: name the folder of a checkpoint"),
            ("chat run", "there is no config.json in run: name the folder of a checkpoint"),
            ("info nothing", "nothing is neither a folder nor a named size (tiny, 70m"),
            ("info ..", "there is no config.json in ..: name the folder of a checkpoint"),
            ("info tiny --context 0", "argument --context: must be an integer of at least 1, got '0'"),
            ("info tiny --context -5", "argument --context: must be an integer of at least 1, got '-5'"),
            ("info tiny --batch 0", "argument --batch: must be an integer of at least 1, got '0'"),
            ("info tiny --batch 1.5", "argument --batch: must be an integer of at least 1, got '1.5'"),
            ("info tiny --dtype int3", "argument --dtype: invalid choice: 'int3'"),
            ("serve", "the following arguments are required: path"),
            ("serve run --port 0", "there is no config.json in run: name the folder of a checkpoint"),
            ("serve .. --port 0", "there is no config.json in ..: name the folder of a checkpoint"),
            ("serve text.txt --port 0", "there is no config.json in text.txt: name the folder of a checkpoint"),
            ("serve run --port x", "argument --port: must be a number from 0 to 65535, got 'x'"),
            ("serve run --port -1", "argument --port: must be a number from 0 to 65535, got '-1'"),
            ("serve run --port 65536", "argument --port: must be a number from 0 to 65535, got '65536'"),
            ("serve run --port 1.5", "argument --port: must be a number from 0 to 65535, got '1.5'"),
            ("serve run --host 192.0.2.1", "cannot listen at 192.0.2.1:8000: [Errno"),
            ("serve run --host ä..b", "cannot listen at ä..b:8000: encoding of hostname failed"),
            ("serve run --host ''", "argument --host: must not be empty"),
            ("serve run --api-key ''", "argument --api-key: must not be empty"),
            ("serve run --api-key 'secret '", "argument --api-key: must not be empty, or begin or end with a blank"),
            ("serve run --port 0 --memory 0", "argument --memory: must be a number from 1e-09 to 1e+09, got '0'"),
            ("serve run --port 0 --memory -1", "argument --memory: must be a number from 1e-09 to 1e+09, got '-1'"),
            ("serve run --port 0 --memory nan", "argument --memory: must be a number from 1e-09 to 1e+09, got 'nan'"),
            ("serve run --port 0 --memory inf", "argument --memory: must be a number from 1e-09 to 1e+09, got 'inf'"),
            ("serve run --port 0 --memory 8GB", "argument --memory: must be a number from 1e-09 to 1e+09, got '8GB'"),
            ("serve run --port 0 --grace -1", "argument --grace: must be a number from 0 to 1e+06, got '-1'"),
            ("serve run --port 0 --grace nan", "argument --grace: must be a number from 0 to 1e+06, got 'nan'"),
            ("serve run --port 0 --max-waiting -1", "max_waiting must be 0 or more, got -1"),
            ("serve run --port 0 --max-context 0", "argument --max-context: must be an integer of at least 1, got '0'"),
            ("serve run --port 0 --device gpu", "device 'gpu' cannot be used here"),
            ("serve run --port 0 --dtype int3", "argument --dtype: invalid choice: 'int3'"),
            ("plan tiny", "the following arguments are required: --memory"),
            ("plan nothing --memory 1", "nothing is neither a folder nor a named size (tiny, 70m"),
            ("plan .. --memory 1", "there is no config.json in ..: name the folder of a checkpoint"),
            ("plan tiny --memory nan", "argument --memory: must be a number from 1e-09 to 1e+09, got 'nan'"),
            ("plan tiny --memory 1e300", "argument --memory: must be a number from 1e-09 to 1e+09, got '1e300'"),
            ("plan tiny --memory 1 --share 0", "--share must be above 0 and at most 1, got 0.0"),
            ("plan tiny --memory 1 --share 1.5", "--share must be above 0 and at most 1, got 1.5"),
            ("plan tiny --memory 1 --share nan", "--share must be above 0 and at most 1, got nan"),
            ("plan tiny --memory 1 --share half", "argument --share: invalid float value: 'half'"),
            ("plan tiny --memory 1 --devices 0", "argument --devices: must be an integer of at least 1, got '0'"),
            ("plan tiny --memory 1 --max-context 9000", "max_context 9000 exceeds the model's 8192 positions"),
            ("plan tiny --memory 0.01", "9.0 MB of memory are not enough for 34.4 MB of weights"),
            ("plan tiny --memory 1 --context 512", "--context is of training: it needs --train"),
            ("plan tiny --machine H100 --devices 3", "4 heads cannot be split over 3 devices"),
            ("plan tiny --machine H101", "no machine named 'H101'; there are H100, H800"),
            ("plan tiny --train", "the following arguments are required with --train: --machine"),
            ("plan tiny --train --machine H100 --dtype int8", "--dtype is of serving: leave it out with --train"),
            ("plan tiny --train --machine H100 --mesh 4", "--mesh is find, or sizes of pp, dp, cp, tp"),
            ("plan tiny --train --machine H100 --mesh cp=x", "as pp=4,cp=2; got 'cp=x'"),
            ("plan tiny --train --machine H100 --mesh tp=2", "tp 2 is 2 ranks, and there are 1: change mesh.pp"),
            ("plan tiny --train --machine H100 --batch-tokens 100", "100 tokens are no multiple of 8192"),
            ("plan tiny --train --machine H100 --memory 0.01", "on 1 GPUs fits into 9.0 MB: the least takes"),
            ("convert a b", "the following arguments are required: --dialect"),
            ("convert a b --dialect transformers", "there is no config.json in a: name the folder of a checkpoint"),
            ("make-tiny x --dialect new", "argument --dialect: invalid choice: 'new'"),
            ("make-tiny text.txt", "text.txt is a file: name a folder for the checkpoint"),
            ("make-tiny .", "which is no part of a checkpoint: choose another folder"),
            ("train missing.toml", "recipe missing.toml does not exist"),
            ("train quickstar", "recipe quickstar does not exist; did you mean quickstart?"),
            ("train .", "recipe . is a folder, not a recipe"),
            ("train recipe.toml --set steps", "override 'steps' must read section.key=value"),
            ("train recipe.toml --set train.sed=3", "unknown key train.sed; did you mean train.seed?"),
            ("train recipe.toml --set schedule.steps=many", "schedule.steps must be an integer, got 'many'"),
            ("train recipe.toml --set optimizer.learning_rate=-1", "optimizer: learning_rate must be above 0, got -1"),
            ("train broken.toml", "recipe broken.toml is not valid TOML"),
            ("train latin.toml", "recipe latin.toml is not UTF-8 (byte 2)"),
            ("train text.txt", "recipe text.txt is not valid TOML"),
            ("train recipe.toml --set data.sources=['latin.txt']", "latin.txt is not UTF-8 at byte offset 6 (0xfc)"),
            ("train recipe.toml --set data.sources=['empty.txt']", "the corpus is empty"),
            ("train recipe.toml --set data.sources=[]", "the corpus is empty"),
            ("train recipe.toml --set data.sources=['*.md']", "no file matches '*.md'"),
            ("quickstart --set schedule.steps=0", "schedule: steps must be at least 1, got 0"),
        ],
    )
    def test_wrong_arguments_are_one_line_and_write_nothing(self, fulmen, folder, arguments, part):
        (folder / "broken.toml").write_text("[data\n")
        (folder / "latin.toml").write_bytes("# ü".encode("latin-1"))
        (folder / "latin.txt").write_bytes("Viel für".encode("latin-1"))
        (folder / "empty.txt").write_text("")
        before = files(folder)
        words = (
            [word.replace("['", '["').replace("']", '"]') for word in arguments.split()] if "[" in arguments else None
        )
        out = assert_refused(fulmen(*(words or shlex.split(arguments))), part)
        assert not out or arguments.startswith("quickstart")
        assert [file for file in files(folder) if file != "runs"] == before


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


def on_terminal(arguments, answers, width=80):
    """Run the command on a terminal, typing each answer once its prompt has been shown; (exit code, all that was)."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    process = start(
        *arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(slave)
    shown, seen, deadline = b"", 0, time.monotonic() + 100
    answers = list(answers)
    while time.monotonic() < deadline:
        try:
            shown += os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
        if answers and (at := shown.find(answers[0][0], seen)) >= 0:
            seen = at + len(answers[0][0])
            os.write(master, answers.pop(0)[1])
    os.close(master)
    process.kill() if process.poll() is None and time.monotonic() > deadline else None
    return process.wait(), shown.decode(errors="replace")


def own_terminal():
    """In the child: its standard input becomes the terminal whose Ctrl-C it gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


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


class TestGenerate:
    def test_the_prompt_and_what_follows(self, fulmen, finished):
        arguments = ("generate", finished, "--prompt", "keys and", "--max-tokens", 20, "--seed", 3)
        code, out, err = fulmen(*arguments)
        assert (code, err) == (0, "")
        assert out.startswith("keys and")
        assert out.endswith("\n")
        assert len(out) > len("keys and\n")
        assert fulmen(*arguments)[1] == out
        assert fulmen("generate", finished / "checkpoint", *arguments[2:])[1] == out

    def test_standard_input(self, fulmen, finished, stdin):
        stdin("keys für\n".encode())
        code, out, err = fulmen("generate", finished, "--max-tokens", 5)
        assert (code, err) == (0, "")
        assert out.startswith("keys für\n")

    def test_standard_input_that_is_not_utf_8(self, fulmen, finished, stdin):
        stdin(b"keys f\xfcr\n")
        out = assert_refused(fulmen("generate", finished), "the input is not UTF-8 at byte offset 6")
        assert out == ""

    def test_an_empty_prompt(self, fulmen, finished):
        code, out, _ = fulmen("generate", finished, "--prompt", "", "--max-tokens", 5, "--temperature", 0)
        assert code == 0
        assert out != "\n"

    def test_a_prompt_that_is_too_long(self, fulmen, finished):
        out = assert_refused(
            fulmen("generate", finished, "--prompt", "keys and values " * 100), "128 is the longest context here"
        )
        assert out == ""

    def test_a_stop_string(self, fulmen, finished):
        greedy = ("generate", finished, "--prompt", "keys and", "--temperature", 0, "--max-tokens", 30)
        answer = fulmen(*greedy)[1].removeprefix("keys and").removesuffix("\n")
        stop = answer[4:6]
        assert fulmen(*greedy, "--stop", stop)[1] == f"keys and{answer[: answer.index(stop)]}\n"

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_narrow_dtypes(self, fulmen, finished, dtype):
        assert fulmen("generate", finished, "-p", "keys", "--max-tokens", 5, "--dtype", dtype)[0] == 0

    def test_a_checkpoint_cut_short(self, fulmen, finished, tmp_path):
        shutil.copytree(finished / "checkpoint", tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        for verb in (("generate", tmp_path / "cut", "-p", "x"), ("chat", tmp_path / "cut")):
            assert_refused(fulmen(*verb), "model.safetensors is cut short or not safetensors", "get it again")
        (tmp_path / "cut" / "tokenizer.json").write_text("{")
        assert_refused(fulmen("generate", tmp_path / "cut", "-p", "x"), "tokenizer.json is not a readable tokenizer")
        (tmp_path / "cut" / "config.json").write_text("{")
        assert_refused(fulmen("info", tmp_path / "cut"), "config.json is not JSON")

    def test_ctrl_c_ends_the_line(self, fulmen, finished, monkeypatch):
        calls = []

        def sample(logits, draws):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return [Drawn(75)]

        monkeypatch.setattr("fulmen.serve.engine.sample", sample)
        code, out, err = fulmen("generate", finished, "-p", "keys")
        assert (code, err) == (130, "fulmen: interrupted\n")
        assert out.endswith("\n")


class TestChat:
    def chat(self, fulmen, stdin, finished, typed, *arguments):
        stdin(typed.encode())
        return fulmen("chat", finished, "--max-tokens", 6, "--temperature", 0, *arguments)

    def test_turns_go_on_until_the_input_ends(self, fulmen, finished, stdin):
        code, out, err = self.chat(fulmen, stdin, finished, "keys?\n\n  \nvalues?\n")
        assert (code, err) == (0, "")
        assert out.count("you: ") == 5
        assert out.count("ai: ") == 2
        assert out.endswith("you: \n")

    def test_exit_leaves(self, fulmen, finished, stdin):
        code, out, _ = self.chat(fulmen, stdin, finished, " /exit \nkeys?\n")
        assert (code, out) == (0, "you: ")

    def test_reset_forgets(self, fulmen, finished, stdin):
        def answers(typed):
            return re.findall(r"ai: (.*)", self.chat(fulmen, stdin, finished, typed, "--seed", "1")[1])

        once = answers("keys?\n")
        assert answers("keys?\n/reset\nkeys?\n") == once * 2
        assert answers("values and decay\n/reset\nkeys?\n")[1:] == once

    def test_the_system_message_counts(self, fulmen, finished, stdin):
        code, _, err = self.chat(fulmen, stdin, finished, "keys?\n", "--system", "Be short. " * 50)
        assert (code, err) == (0, "")
        out = self.chat(fulmen, stdin, finished, "keys?\n", "--system", "a " * 90)[1]
        assert "128 is the longest context here" in out

    def test_a_conversation_that_is_too_long_can_be_begun_anew(self, fulmen, finished, stdin):
        code, out, _ = self.chat(fulmen, stdin, finished, "a " * 200 + "\n/reset\nkeys?\n")
        assert code == 0
        refused, answered = re.findall(r"ai: (.*)", out)
        assert re.fullmatch(
            r"\[the prompt has \d+ tokens; 128 is the longest context here, .*; /reset starts anew\]", refused
        )
        assert answered

    def test_input_that_is_not_utf_8(self, fulmen, finished, monkeypatch):
        content = io.TextIOWrapper(io.BytesIO(b"f\xfcr\n"), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", content)
        assert_refused(fulmen("chat", finished), "the input is not UTF-8 at byte offset 1")

    def test_on_a_terminal(self, finished):
        """Ctrl-C leaves an answer and not the chat, Ctrl-D leaves the chat."""
        code, shown = on_terminal(
            ["chat", finished, "--temperature", 1, "--max-tokens", 100],
            [
                (b"you: ", b"keys and\n"),
                (b"ai: ", b"\x03"),
                (b"you: ", b"values?\n"),
                (b"ai: ", b""),
                (b"you: ", b"\x04"),
            ],
        )
        assert code == 0
        assert shown.count("ai: ") == 2
        assert "Traceback" not in shown


class TestInfo:
    @pytest.mark.parametrize("name", ["tiny", "70m", "160m", "410m", "1b", "3b", "7b", "minimax-text-01"])
    def test_named_sizes(self, fulmen, name):
        code, out, err = fulmen("info", name)
        assert (code, err) == (0, "")
        assert re.search(r"^parameters +[\d.]+ [MB] total, [\d.]+ [MB] active", out, re.MULTILINE)

    def test_the_published_size(self, fulmen):
        out = fulmen("info", "minimax-text-01", "--context", 1_000_000, "--dtype", "int8")[1]
        assert "456.1 B total, 45.9 B active" in out

    def test_a_run_and_its_checkpoint(self, fulmen, finished):
        code, out, _ = fulmen("info", finished)
        assert code == 0
        assert "2: 1 lightning, 1 softmax" in out
        assert fulmen("info", finished / "checkpoint")[1] == out

    def test_more_context_and_batch_take_more(self, fulmen):
        def cached(*arguments):
            return float(re.search(r"keys and values +([\d.]+) MB", fulmen("info", "tiny", *arguments)[1])[1])

        assert cached("--context", 32768) == pytest.approx(4 * cached("--context", 8192), rel=0.02)
        assert cached("--batch", 4) == pytest.approx(4 * cached(), rel=0.02)


class TestCheckpoints:
    def test_make_tiny_and_convert(self, fulmen, folder):
        code, out, _ = fulmen("make-tiny", "small", "--dialect", "transformers")
        assert (code, out) == (0, "wrote small in the transformers dialect\n")
        code, out, _ = fulmen("convert", "small", "other", "--dialect", "original", "--dtype", "bfloat16")
        assert (code, out) == (0, "wrote other in the original dialect\n")
        assert json.loads((folder / "other/config.json").read_text())["model_type"] == "minimax_text_01"
        greedy = ("-p", "attention", "--temperature", 0, "--max-tokens", 8)
        assert fulmen("generate", "other", *greedy) == fulmen("generate", "small", *greedy)
        # Half of a head rotated, as make-tiny writes the original dialect, cannot be said in the other.
        assert fulmen("make-tiny", "released")[0] == 0
        result = fulmen("convert", "released", "third", "--dialect", "transformers")
        assert_refused(result, "the transformers dialect cannot hold rotary_dim 32")
        assert not (folder / "third").exists()

    def test_a_run_can_be_converted(self, fulmen, finished, folder):
        assert fulmen("convert", finished, "copy", "--dialect", "transformers")[0] == 0
        assert json.loads((folder / "copy/generation_config.json").read_text())["eos_token_id"] == 288
        greedy = ("-p", "keys", "--temperature", 0, "--max-tokens", 8)
        assert fulmen("generate", "copy", *greedy) == fulmen("generate", finished, *greedy)


class TestPlan:
    def test_serving_on_a_machine_says_what_each_gpu_holds(self, fulmen):
        plan = ("plan", "minimax-text-01", "--dtype", "int8", "--devices", 8, "--max-context", 1_000_000)
        code, divided, _ = fulmen(*plan, "--memory", 80)
        assert (code, divided.splitlines()[0]) == (0, "8 x 80 GB, of which 90%; int8 weights")
        code, out, _ = fulmen(*plan, "--machine", "H800")
        assert (code, out[: len(divided)]) == (0, divided)
        assert re.search(r"on each H800 +tp 8, ep 8, etp 1\n +weights +57.4 GB", out)
        code, out, _ = fulmen(*plan, "--machine", "H800", "--memory", 96)
        assert (code, out.splitlines()[0]) == (0, "8 x 96 GB, of which 90%; int8 weights")

    def test_training(self, fulmen):
        plan = ("plan", "tiny-vl", "--train", "--machine", "H800", "--devices", 8, "--batch-tokens", 2**17)
        code, out, _ = fulmen(*plan, "--mesh", "pp=2,cp=2, ep=4")
        assert code == 0
        assert out.startswith("of the text model alone")
        for part in (
            r"mesh +pp 2 x dp 2 x cp 2 x tp 1\n",
            r"of experts +pp 2 x edp 1 x etp 1 x ep 4\n",
            "why this one",
        ):
            assert re.search(part, out), part
        code, out, _ = fulmen(*plan, "--mesh", "cp=8", "--memory", 0.01)
        assert (code, "does not fit: " in out) == (0, True)


class TestServe:
    """What keeps a server from its start; tests/serve/test_server.py has what happens then."""

    @pytest.mark.parametrize("state", ["listens", "loads"])
    def test_a_port_that_is_taken(self, fulmen, finished, state):
        with socket.socket() if state == "listens" else serving._listen("127.0.0.1", 0) as other:
            if state == "listens":
                other.bind(("127.0.0.1", 0))
                other.listen()
            port = other.getsockname()[1]
            result = fulmen("serve", finished, "--port", port)
        assert not assert_refused(result, f"cannot listen at 127.0.0.1:{port}: [Errno", "give another --host or --port")

    def test_a_run_that_has_not_ended(self, fulmen, finished, folder):
        shutil.copytree(finished, "run", ignore=shutil.ignore_patterns("checkpoint"))
        assert_refused(fulmen("serve", "run", "--port", 0), "run is a training run that has not ended")

    def test_memory_that_is_too_little_is_refused_with_what_would_do(self, fulmen, finished, monkeypatch):
        """The numbers that the first refusal names are right, the flag too."""
        monkeypatch.setattr(serving, "_run", ended)
        result = fulmen("serve", finished, "--port", 0, "--memory", 0.0005)
        assert not assert_refused(result, "500.0 kB of memory are not enough for")
        enough = float(re.search(r": ([\d.]+) MB are$", result[2])[1])
        assert fulmen("serve", finished, "--port", 0, "--memory", f"{enough / 1000:.6f}")[0] == 0
        assert fulmen("serve", finished, "--port", 0, "--memory", f"{(enough - 0.1) / 1000:.6f}")[0] == 2

    def test_a_context_that_is_too_long_is_refused_with_the_one_that_would_do(self, fulmen):
        plan = ("plan", "tiny", "--memory", 0.05, "--chunk-tokens", 64)
        result = fulmen(*plan, "--max-context", 8192)
        assert not assert_refused(result, "8192 tokens do not fit into 45.0 MB", " would; give that as --max-context")
        fitting = int(re.search(r": (\d+) would", result[2])[1])
        code, out, _ = fulmen(*plan, "--max-context", fitting)
        assert (code, re.search(r"longest sequence +(\d+)", out)[1]) == (0, str(fitting))
        assert fulmen(*plan, "--max-context", fitting + 1)[0] == 2


async def ended(*_):
    """A server that somebody has stopped already."""


def test_a_reader_that_has_gone():
    """`fulmen info tiny | head -0`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("info", "tiny", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_terminal_that_lacks_the_letters(finished):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fulmen", "generate", finished, "-p", "für", "--max-tokens", "2"]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.startswith(b"f?r")


def test_help_needs_no_torch():
    """So that it answers at once."""
    script = "import sys; from fulmen.cli import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_examples_name_shipped_recipes():
    shipped = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.toml")}
    assert "quickstart" in shipped
