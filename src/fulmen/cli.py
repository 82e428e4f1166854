"""The verbs of the `fulmen` command: arguments in, a room's function called, results printed. Nothing is decided here.

A room is imported by the verb that needs it, so that `fulmen --help` answers at once.
"""

import argparse
import contextlib
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from fulmen.config import UserError, load_recipe

SAMPLES = ("def ", "import ", "class ")
DTYPES = ("float32", "bfloat16", "float16")
DIALECTS = ("original", "transformers")


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
        code = _fail(str(error), 2)
    except KeyboardInterrupt:
        print("fulmen: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has gone (`fulmen info ... | head`); what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print(f"fulmen: error: {message}", file=sys.stderr)
    return code


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fulmen", description="MiniMax-01 hybrid lightning-attention models, trained and used.")
    verbs = parser.add_subparsers(metavar="VERB [OPTIONS]", required=True)
    _add_training(verbs)
    _add_generation(verbs)
    _add_checkpoints(verbs)
    _add_marl(verbs)
    _add_bench(verbs)
    return parser


def _verb(verbs, name: str, run: Callable[[argparse.Namespace], int] | None, text: str, example: str):
    parser = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_training(verbs) -> None:
    parser = _verb(
        verbs,
        "quickstart",
        _quickstart,
        "train a small model on this Python's own library, then let it write",
        "fulmen quickstart",
    )
    _recipe_arguments(parser)
    parser = _verb(
        verbs,
        "train",
        _train,
        "train as a recipe says",
        "fulmen train quickstart --dir runs/first --set schedule.steps=200",
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last good snapshot in the run's folder")
    _recipe_arguments(parser)


def _recipe_arguments(parser: argparse.ArgumentParser, default: str = "runs/NAME-OF-RECIPE") -> None:
    parser.add_argument("--dir", type=Path, help=f"folder of the run (default: {default})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override a key of the recipe; may be given several times",
    )


def _add_generation(verbs) -> None:
    parser = _verb(
        verbs,
        "generate",
        _generate,
        "continue a text",
        "fulmen generate runs/quickstart --prompt 'def main(' --max-tokens 100",
    )
    _sampling_arguments(parser)
    parser.add_argument("--prompt", "-p", help="text to continue (default: read from standard input)")
    parser = _verb(
        verbs,
        "chat",
        _chat,
        "talk with a model; /reset forgets, /exit or Ctrl-D leaves",
        "fulmen chat runs/quickstart --temperature 0.5",
    )
    _sampling_arguments(parser)
    parser.add_argument("--system", help="system message that opens the conversation")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a checkpoint's folder, or a training run's")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of an answer at most (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among those that reach probability P (default: 1)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.add_argument("--seed", type=int, help="same seed, same answer (default: new each time)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def _add_checkpoints(verbs) -> None:
    parser = _verb(
        verbs,
        "info",
        _info,
        "print a model's sizes and the memory that it needs",
        "fulmen info minimax-text-01 --context 1000000 --batch 1 --dtype int8",
    )
    parser.add_argument("model", help="a named size, a checkpoint's folder or a training run's")
    parser.add_argument("--context", type=_count, default=8192, help="tokens per sequence (default: 8192)")
    parser.add_argument("--batch", type=_count, default=1, help="sequences at a time (default: 1)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="bfloat16", help="(default: bfloat16)"
    )
    parser = _verb(
        verbs,
        "convert",
        _convert,
        "rewrite a checkpoint in another dialect or dtype",
        "fulmen convert runs/quickstart quickstart-hf --dialect transformers",
    )
    parser.add_argument("source", type=Path, help="a checkpoint's folder, or a training run's")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--dialect", choices=DIALECTS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser = _verb(
        verbs,
        "make-tiny",
        _make_tiny,
        "write a tiny random checkpoint with a tokenizer, for tests",
        "fulmen make-tiny tiny-minimax --dialect transformers",
    )
    parser.add_argument("path", type=Path, help="folder to write")
    parser.add_argument("--dialect", choices=DIALECTS, default="original", help="(default: original)")


def _add_marl(verbs) -> None:
    text = "teams of agents that teach each other: train, compare, render"
    marl = _verb(verbs, "marl", None, text, "fulmen marl train marl/sparse")
    verbs = marl.add_subparsers(metavar="VERB [OPTIONS]", required=True)
    parser = _verb(
        verbs, "train", _marl_train, "train a team as a recipe says", "fulmen marl train marl/sparse --set run.seed=1"
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last good snapshot in the run's folder")
    _recipe_arguments(parser, "runs/marl/NAME-OF-RECIPE")
    parser = _verb(
        verbs,
        "compare",
        _marl_compare,
        "train a recipe's team by several methods and seeds, and print the table",
        "fulmen marl compare marl/sparse --methods none,pat --seeds 10 --workers 2",
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    parser.add_argument("--methods", help="names with commas between (default: none,pat; without them with --variant)")
    parser.add_argument(
        "--variant",
        metavar="'NAME A.B=VALUE ...'",
        action="append",
        default=[],
        help="a method of your own: a name, and keys of the recipe to override; may be given several times",
    )
    parser.add_argument("--baseline", metavar="NAME", default="none", help="method to compare with (default: none)")
    parser.add_argument("--seeds", type=_count, default=10, help="runs of each method (default: 10)")
    parser.add_argument("--workers", type=_count, help="processes at a time (default: cores / run.threads)")
    _recipe_arguments(parser, "runs/marl/NAME-OF-RECIPE-compare")
    parser = _verb(
        verbs, "render", _marl_render, "draw an episode of a trained team", "fulmen marl render runs/marl/sparse"
    )
    parser.add_argument("path", type=Path, help="the folder of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the episode (default: 0)")
    parser.add_argument("--own", action="store_true", help="by the agents' own policies, without transfer")
    parser.add_argument("--out", type=Path, help="the GIF to write (default: plots/episode.gif in the run's folder)")


def _train(arguments: argparse.Namespace) -> int:
    from fulmen.train import TrainingDivergedError, TrainRecipe, train

    recipe = load_recipe(arguments.recipe, TrainRecipe, arguments.set)
    folder = arguments.dir or Path("runs") / Path(arguments.recipe).stem
    try:
        result = train(recipe, folder, resume=arguments.resume, report=functools.partial(print, flush=True))
    except TrainingDivergedError as error:
        return _fail(str(error), 1)
    if result.checkpoint is None:
        return _stopped(["train"], folder, f"step {result.step} of {recipe.schedule.steps}", result.stopped_by)
    print(f"checkpoint: {result.checkpoint}\nloss plot:  {folder / 'plots' / 'loss.png'}")
    return 0


def _stopped(verb: list[str], folder: Path, place: str, signal_number: int) -> int:
    # The run's own copy of the recipe holds all that --set changed.
    command = shlex.join(["fulmen", *verb, str(folder / "recipe.toml"), "--dir", str(folder), "--resume"])
    print(f"stopped at {place}, snapshot saved; go on with\n  {command}")
    return 128 + signal_number


def _quickstart(arguments: argparse.Namespace) -> int:
    folder = arguments.dir or Path("runs/quickstart")
    if (folder / "checkpoint").exists() and not arguments.set:
        print(f"{folder} holds a trained model; delete the folder to train it anew.")
    else:
        print("Training a hybrid lightning + softmax mixture-of-experts model on the Python standard library's source.")
        # A run that was broken off goes on.
        code = _train(argparse.Namespace(recipe="quickstart", dir=folder, set=arguments.set, resume=True))
        if code:
            return code
    _print_samples(folder)
    print(f"""
Go on with:
  fulmen chat {folder}                          ask it for a function
  fulmen generate {folder} --prompt 'import '   let it continue a text
  fulmen info {folder}                          sizes and memory
  tensorboard --logdir {folder}/tensorboard     all curves (loss, expert load, router entropy)""")
    return 0


def _print_samples(folder: Path) -> None:
    from fulmen.run import read_metrics
    from fulmen.serve import Conversation, SamplingParams, TextGenerator

    curve = [
        line["held_out_bits_per_byte"] for line in read_metrics(folder / "metrics.jsonl") if "held_out_loss" in line
    ]
    if curve:
        print(f"\nHeld-out text: {curve[0]:.2f} bits per byte before training, {curve[-1]:.2f} after.")
    generator = TextGenerator.load(folder)
    params = SamplingParams(max_tokens=80, temperature=0.7, top_p=0.95, seed=1)
    for prompt in SAMPLES:
        print(f"\n--- it continues {prompt!r} ---\n{prompt}{generator.generate(prompt, params)}")
    request = "Return the number of items in the list."
    print(f"\n--- asked: {request} ---\n{''.join(Conversation(generator).reply(request, params))}")


def _generate(arguments: argparse.Namespace) -> int:
    params = _sampling_params(arguments)
    prompt = _read_prompt() if arguments.prompt is None else arguments.prompt
    generator = _load_generator(arguments)
    pieces = generator.stream(generator.encode(prompt), params)
    print(prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
    finally:
        print()
    return 0


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("type the text to continue, then Ctrl-D:", file=sys.stderr)
    with _utf8_input():
        return sys.stdin.read()


@contextlib.contextmanager
def _utf8_input() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"the input is not UTF-8 at byte offset {error.start}: convert it, for example with iconv"
        ) from None


def _chat(arguments: argparse.Namespace) -> int:
    from fulmen.serve import Conversation

    # Gives `input` its line editing and history, where Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

    params = _sampling_params(arguments)
    generator = _load_generator(arguments)
    conversation = Conversation(generator, system=arguments.system)
    while True:
        try:
            with _utf8_input():
                text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            conversation = Conversation(generator, system=arguments.system)
        elif text:
            _print_reply(conversation, text, params)


def _print_reply(conversation, text: str, params) -> None:
    """Stream an answer; Ctrl-C leaves it and keeps the conversation, and so does an error the user can mend."""
    print("ai: ", end="", flush=True)
    try:
        with contextlib.closing(conversation.reply(text, params)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [left]", end="")
    except UserError as error:
        print(f"[{error}; /reset starts anew]", end="")
    print()


def _sampling_params(arguments: argparse.Namespace):
    from fulmen.serve import SamplingParams

    return SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )


def _load_generator(arguments: argparse.Namespace):
    import torch

    from fulmen.model import choose_device
    from fulmen.serve import TextGenerator

    device = choose_device(arguments.device)
    return TextGenerator.load(arguments.path, device=device, dtype=getattr(torch, arguments.dtype))


def _add_bench(verbs) -> None:
    from fulmen.bench import NAMES

    width = max(map(len, NAMES))
    parser = _verb(
        verbs,
        "bench",
        _bench,
        "time ours beside every peer that is installed",
        "fulmen bench lightning --json lightning.json\n  fulmen bench lightning --draw lightning.json docs/images"
        "\n\nbenchmarks:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in NAMES.items()),
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="one of those below")
    parser.add_argument("--only", metavar="TABLE", help="one of its tables instead of all")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers there")
    pictures = "measure nothing: draw the numbers of a --json FILE into FOLDER"
    work.add_argument("--draw", type=Path, nargs=2, metavar=("FILE", "FOLDER"), help=pictures)


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.draw is not None:
        from fulmen.bench.plots import draw

        for path in draw(arguments.name, *arguments.draw, only=arguments.only):
            print(f"wrote {path}")
        return 0
    from fulmen.bench import run

    run(arguments.name, arguments.only, arguments.json)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fulmen.checkpoint import load_config
    from fulmen.model import PRESETS, describe
    from fulmen.serve import find_checkpoint

    known = arguments.model in PRESETS or not Path(arguments.model).exists()
    config = PRESETS.get(arguments.model) if known else load_config(find_checkpoint(arguments.model))
    if config is None:
        raise UserError(f"{arguments.model} is neither a folder nor a named size ({', '.join(PRESETS)})")
    print(describe(config, context=arguments.context, batch=arguments.batch, dtype=arguments.dtype))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from fulmen.checkpoint import load_generation_config, load_model, save_model
    from fulmen.data import Tokenizer
    from fulmen.serve import find_checkpoint

    source = find_checkpoint(arguments.source)
    generation = load_generation_config(source)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    eos_id = next(iter(generation.eos_ids), None)
    model = load_model(source, dtype=getattr(torch, arguments.dtype))
    save_model(model, arguments.target, arguments.dialect, tokenizer=tokenizer, eos_id=eos_id, bos_id=generation.bos_id)
    print(f"wrote {arguments.target} in the {arguments.dialect} dialect")
    return 0


def _make_tiny(arguments: argparse.Namespace) -> int:
    from fulmen.checkpoint import make_tiny

    make_tiny(arguments.path, dialect=arguments.dialect)
    print(f"wrote {arguments.path} in the {arguments.dialect} dialect")
    return 0


def _marl_train(arguments: argparse.Namespace) -> int:
    from fulmen.marl import MarlRecipe, train

    recipe = load_recipe(arguments.recipe, MarlRecipe, arguments.set)
    folder = arguments.dir or Path("runs/marl") / Path(arguments.recipe).stem
    result = train(recipe, folder, resume=arguments.resume, report=functools.partial(print, flush=True))
    if result.checkpoint is None:
        place = f"frame {result.frames:,} of {recipe.run.frames:,}"
        return _stopped(["marl", "train"], folder, place, result.stopped_by)
    print(f"checkpoint: {result.checkpoint}\npictures:   {', '.join(map(str, result.pictures))}")
    return 0


def _marl_compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fulmen.marl import MarlRecipe
    from fulmen.marl.compare import WIDTH, compare, parse_variant

    recipe = load_recipe(arguments.recipe, MarlRecipe, arguments.set)
    folder = arguments.dir or Path("runs/marl") / f"{Path(arguments.recipe).stem}-compare"
    named = arguments.methods or ("" if arguments.variant else "none,pat")
    methods = [name.strip() for name in named.split(",") if name.strip()]
    methods += map(parse_variant, arguments.variant)
    comparison = compare(
        recipe,
        folder,
        methods=methods,
        seeds=arguments.seeds,
        workers=arguments.workers,
        baseline=arguments.baseline,
    )
    # A table that a file keeps or a pipe takes is not cut to a terminal's width.
    Console(width=None if sys.stdout.isatty() else WIDTH).print(comparison)
    print(f"\ntables, curves and plots: {folder}")
    return 1 if comparison.failures else 0


def _marl_render(arguments: argparse.Namespace) -> int:
    from fulmen.marl import render_episode

    print(f"wrote {render_episode(arguments.path, seed=arguments.seed, out=arguments.out, own=arguments.own)}")
    return 0


if __name__ == "__main__":
    main()
