"""What several verbs share: how one is declared, and how it says that it failed or stopped."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from fulmen.config import UserError

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_HELP = "of the weights; int8: of experts and projections alone, rounded while they are read (default: float32)"


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def model_config(model: str):
    """The configuration of a named size, or of the checkpoint that a path means."""
    from fulmen.checkpoint import find_checkpoint, load_config
    from fulmen.model import PRESETS, VISION_LANGUAGE_PRESETS

    presets = PRESETS | VISION_LANGUAGE_PRESETS
    if model in presets:
        return presets[model]
    if not Path(model).exists():
        raise UserError(f"{model} is neither a folder nor a named size ({', '.join(presets)})")
    return load_config(find_checkpoint(model))


def verb(verbs, name: str, run: Callable[[argparse.Namespace], int] | None, text: str, example: str):
    parser = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def recipe_arguments(parser: argparse.ArgumentParser, default: str = "runs/NAME-OF-RECIPE") -> None:
    parser.add_argument("--dir", type=Path, help=f"folder of the run (default: {default})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override a key of the recipe; may be given several times",
    )


def fail(message: str, code: int) -> int:
    print(f"fulmen: error: {message}", file=sys.stderr)
    return code


def stopped(verb: list[str], folder: Path, place: str, signal_number: int) -> int:
    # The run's own copy of the recipe holds all that --set changed.
    command = shlex.join(["fulmen", *verb, str(folder / "recipe.toml"), "--dir", str(folder), "--resume"])
    print(f"stopped at {place}, snapshot saved; go on with\n  {command}")
    return 128 + signal_number
