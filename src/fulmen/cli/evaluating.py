"""`fulmen eval`: what a trained model can do, measured on what training held out."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from fulmen.cli.parts import count, verb
from fulmen.config import UserError

PICTURES = ("emoji", "digits", "words", "charts")


def add(verbs) -> None:
    parser = verb(
        verbs,
        "eval",
        None,
        "measure a trained model on what its training held out",
        "fulmen eval answers runs/vision-4-preference --count 100",
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    one = _task(tasks, "answers", _answers, "questions about pictures: how many answers are right, and right on noise")
    _picture_arguments(one)
    one.add_argument("--thumbnail", action="store_true", help="show the squashed picture alone, as in the first stage")
    one = _task(tasks, "encoder", _encoder, "zero-shot classification and retrieval of a CoCa run, beside chance")
    _picture_arguments(one)
    one = _task(tasks, "text", _text, "bits per byte of text")
    one.add_argument("--sources", nargs="+", default=["stdlib"], help="as in a recipe's data.sources (default: stdlib)")
    one.add_argument("--held-out", type=float, default=0.05, help="share that training held out (default: 0.05)")
    one.add_argument("--tokens", type=count, default=16384, help="of them, at most (default: 16384)")


def _task(tasks, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser = verb(tasks, name, run, text, f"fulmen eval {name} runs/mine")
    parser.add_argument("path", type=Path, help="a checkpoint's folder, or a training run's")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


def _picture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", nargs="+", default=list(PICTURES), help="(default: all that are built in)")
    parser.add_argument("--held-out", type=float, default=0.05, help="share that training held out (default: 0.05)")
    parser.add_argument("--count", type=count, default=100, help="pictures of each kind, at most (default: 100)")


def _answers(arguments: argparse.Namespace) -> int:
    _check_place(arguments)
    from fulmen.evals.answers import answer_table, load_engine

    engine = load_engine(arguments.path, device=arguments.device, thumbnail=arguments.thumbnail)
    settings = {"held_out": arguments.held_out, "count": arguments.count}
    return _report(answer_table(engine, arguments.pictures, **settings), arguments)


def _encoder(arguments: argparse.Namespace) -> int:
    _check_place(arguments)
    from fulmen.evals.encoder import encoder_table

    settings = {"held_out": arguments.held_out, "count": arguments.count, "device": arguments.device}
    return _report(encoder_table(arguments.path, arguments.pictures, **settings), arguments)


def _text(arguments: argparse.Namespace) -> int:
    _check_place(arguments)
    from fulmen.evals.text import text_table

    settings = {"held_out": arguments.held_out, "max_tokens": arguments.tokens, "device": arguments.device}
    return _report(text_table(arguments.path, arguments.sources, **settings), arguments)


def _check_place(arguments: argparse.Namespace) -> None:
    """Before minutes are spent on what could not be written."""
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"{arguments.json.parent} is no folder to write {arguments.json.name} into: make it first")


def _report(rows: list[dict], arguments: argparse.Namespace) -> int:
    for row in rows:
        shown = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in row.items()}
        print("  ".join(f"{name}: {value}" for name, value in shown.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")
    return 0
