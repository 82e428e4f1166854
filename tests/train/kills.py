"""Scenes for test_resume.py, in the working directory: a run left alone, and one that dies again and again.

Each life of the run is a forked child, because importing torch anew for each would take minutes. Prints, for each
random death, how many calls of the file system the life had made.
"""

import os
import random
import signal

# A run imports these when it needs them; here once, instead of in each of its lives.
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch

import fulmen.checkpoint.writer
import fulmen.train.models
import fulmen.train.run
from fulmen.cli import main

CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")
SETTINGS = (
    "schedule.steps=5",
    "schedule.warmup=1",
    "schedule.decay=1",
    "train.snapshot_every=1",
    "train.evaluate_every=2",
)


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def fork(run, prepare=None):
    """Train in a forked child; gives back its exit code, negative if a signal ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if prepare:
            prepare()
        overrides = [word for setting in SETTINGS for word in ("--set", setting)]
        main(["train", "recipe.toml", "--dir", run, "--resume", *overrides])
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def die_at_call(number):
    """Replace the calls of `os` so that the process dies just before the one of that number."""
    left = number

    def dying(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def die_in_tokenizer():
    fulmen.train.models.Tokenizer.train = die


def die_in_first_evaluation():
    fulmen.train.run.Trainer.evaluate = die


def die_in_plot():
    fulmen.train.run.plot_curves = die


def die_in_weights():
    real = fulmen.checkpoint.writer.save_file

    def save_half(tensors, path, metadata):
        real(dict(list(tensors.items())[:3]), path, metadata)
        die()

    fulmen.checkpoint.writer.save_file = save_half


def dies(prepare):
    assert fork("killed", prepare) == -signal.SIGKILL, prepare.__name__


def dies_at_random_calls(most):
    """Lives that die at a random call of their first `most`, until one has so few calls to make that it ends well."""
    while True:
        calls = generator.randrange(most)
        code = fork("killed", lambda calls=calls: die_at_call(calls))
        if code == 0:
            return
        assert code == -signal.SIGKILL, code
        print(calls, flush=True)


def scenes():
    assert fork("straight") == 0
    dies(die_in_tokenizer)
    dies(die_in_first_evaluation)
    dies_at_random_calls(60)
    dies(die_in_plot)
    dies(die_in_weights)
    dies_at_random_calls(60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    generator = random.Random(0)
    scenes()
