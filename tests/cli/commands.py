"""The command as a person meets it: exit codes, one line for what they can mend, nothing half-written."""

import os
import pty
import re
import subprocess
import sys
import time

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


async def ended(*_):
    """A server that somebody has stopped already."""
