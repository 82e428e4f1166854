"""The verbs of the `fulmen` command: arguments in, a room's function called, results printed. Nothing is decided here.

A room is imported by the verb that needs it, so that `fulmen --help` answers at once.
"""

import argparse
import os
import signal
import sys
from typing import NoReturn

from fulmen.cli import bench, checkpoints, evaluating, marl, planning, serving, training, using
from fulmen.cli.parts import fail
from fulmen.config import UserError

VERBS = (training, using, serving, planning, evaluating, checkpoints, marl, bench)
"""The modules that declare and run them."""


class _Parser(argparse.ArgumentParser):
    """A wrong argument is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 done, 1 training failed, 2 for the user to mend, 128 + n stopped by signal n."""
    # A model may write what the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        # Of several ranks that refuse the same, one tells.
        code = 2 if getattr(error, "told_by_first", False) else fail(str(error), 2)
    except KeyboardInterrupt:
        print("fulmen: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has gone (`fulmen info ... | head`); what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fulmen", description="MiniMax-01 hybrid lightning-attention models, trained and used.")
    verbs = parser.add_subparsers(metavar="VERB [OPTIONS]", required=True)
    for module in VERBS:
        module.add(verbs)
    return parser
