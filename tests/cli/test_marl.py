"""`fulmen marl` as a person meets it: exit codes, one line for what they can mend, what it says it wrote."""

import functools
import os
import re
import shlex
import signal

import pytest

from fulmen.cli import _parser
from fulmen.marl import Team
from fulmen.run import SnapshotStore

RECIPE = """
[world]
name = "navigation"
num_worlds = 2
options = { agents = 2, max_steps = 4 }
[learner]
hidden = [8]
batch = 8
[team]
warmup = 8
capacity = 100
[run]
frames = 24
evaluate_every = 8
episodes = 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def marl(fulmen, folder):
    """marl("train", "small.toml") gives (exit code, standard output, standard error)."""
    return functools.partial(fulmen, "marl")


def assert_refused(result, *parts):
    code, _, err = result
    assert code == 2, result
    assert re.fullmatch(r"fulmen( marl( \w+)?)?: error: [^\n]+\n", err), err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("verb", [(), ("train",), ("compare",), ("render",)])
def test_help_has_an_example_that_parses(marl, verb):
    code, out, err = marl(*verb, "--help")
    assert (code, err) == (0, "")
    words = shlex.split(re.search(r"^example:\n +(.+)$", out, re.MULTILINE)[1])
    assert words[:2] == ["fulmen", "marl"]
    assert not verb or words[2] == verb[0]
    assert callable(_parser().parse_args(words[1:]).run)


def test_train_and_render(marl, folder):
    code, out, err = marl("train", "small.toml", "--set", "run.seed=3")
    assert (code, err) == (0, "")
    assert re.search(r"own return \S+  PAT return \S+  student \d+%", out)
    assert "checkpoint: runs/marl/small/checkpoint\n" in out
    for path in re.search(r"pictures: +(.+)", out)[1].split(", "):
        assert (folder / path).exists()
    code, out, err = marl("render", "runs/marl/small", "--seed", 1, "--own", "--out", "film.gif")
    assert (code, out, err) == (0, "wrote film.gif\n", "")
    assert (folder / "film.gif").exists()


def test_a_stopped_run_says_how_it_goes_on(marl, folder, monkeypatch):
    real = Team.step

    def step(team):
        if team.frames == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(team)

    monkeypatch.setattr(Team, "step", step)
    code, out, _ = marl("train", "small.toml", "--dir", "a", "--set", "run.seed=3")
    assert code == 128 + signal.SIGTERM
    assert "stopped at frame 14 of 24, snapshot saved; go on with\n" in out
    assert SnapshotStore(folder / "a" / "snapshots").steps() == [14]
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:2] == ["fulmen", "marl"]
    code, out, _ = marl(*command[2:])
    assert code == 0
    assert "checkpoint: a/checkpoint" in out


def test_compare_prints_the_table(marl, folder):
    code, out, err = marl("compare", "small.toml", "--methods", "none,pat", "--seeds", 1, "--workers", 2)
    assert (code, err) == (0, "")
    assert "own policies only" in out
    assert re.search(r"^ *pat ", out, re.MULTILINE)
    assert out.endswith("tables, curves and plots: runs/marl/small-compare\n")
    assert (folder / "runs/marl/small-compare/comparison.json").exists()


def test_compare_takes_methods_of_ones_own(marl, folder):
    variants = ("--variant", "fast learner.actor_lr=0.01", "--variant", "slow learner.actor_lr=0.001")
    code, out, err = marl("compare", "small.toml", *variants, "--baseline", "slow", "--seeds", 1)
    assert (code, err) == (0, "")
    assert "against slow" in out
    assert re.findall(r"^ *(\w+) +1 ", out, re.MULTILINE) == ["fast", "slow"] * 2


def test_compare_with_a_run_that_fails(marl, folder, monkeypatch):
    """A value that only the method itself can refuse."""
    code, out, _ = marl(
        *("compare", "small.toml", "--methods", "none,adhoc_visit", "--seeds", 1),
        *("--set", "learner.memory.kind=lightning"),
    )
    assert code == 1
    assert "adhoc_visit, seed 0 failed: " in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ["the following arguments are required: VERB"]),
        (("trian", "small.toml"), ["invalid choice: 'trian'"]),
        (("train", "smal.toml"), ["recipe smal.toml does not exist; did you mean small.toml?"]),
        (("train", "marl/sprse"), ["did you mean marl/sparse?"]),
        (("train", "quickstart"), ["unknown key model"]),
        (("train", "small.toml", "--set", "world.options.agnts=2"), ["unknown option agnts, did you mean agents?"]),
        (("compare", "small.toml", "--seeds", "0"), ["argument --seeds: must be an integer of at least 1, got '0'"]),
        (("compare", "small.toml", "--methods", "non"), ["unknown method 'non'; did you mean none?"]),
        (("render", "nowhere"), ["there is no trained team in nowhere"]),
    ],
)
def test_one_line_for_what_can_be_mended(marl, arguments, parts):
    assert_refused(marl(*arguments), *parts)
