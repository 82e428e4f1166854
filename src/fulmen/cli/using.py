"""`fulmen generate` and `chat`."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fulmen.cli.parts import DTYPE_HELP, DTYPES, verb
from fulmen.config import UserError


def add(verbs) -> None:
    parser = verb(
        verbs,
        "generate",
        _generate,
        "continue a text, or answer a question about images",
        "fulmen generate runs/quickstart --prompt 'def main(' --max-tokens 100",
    )
    _sampling_arguments(parser)
    parser.add_argument("--prompt", "-p", help="text to continue (default: read from standard input)")
    help_text = "show it to the model, and answer the prompt as a user's message after it; repeatable"
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help=help_text)
    parser = verb(
        verbs,
        "chat",
        _chat,
        "talk with a model; /image FILE shows one with the next line, /reset forgets, /exit or Ctrl-D leaves",
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
    help_text = "draw among those with at least this part of the likeliest one's probability (default: 0)"
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help=help_text)
    help_text = "above 1 makes tokens of prompt and answer less likely (default: 1)"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help=help_text)
    help_text = "taken from the logit of a token in the answer, once or each time (default: 0)"
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help=help_text)
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help=help_text)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.add_argument("--seed", type=int, help="same seed, same answer (default: new each time)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    parser.add_argument("--dtype", choices=(*DTYPES, "int8"), default="float32", help=DTYPE_HELP)


def _generate(arguments: argparse.Namespace) -> int:
    from fulmen.serve.conversation import user_turn

    params = _sampling_params(arguments)
    prompt = _read_prompt() if arguments.prompt is None else arguments.prompt
    # Before minutes are spent on loading.
    images = [_open_image(path) for path in arguments.image]
    if images:
        _check_shapes(arguments.path, images)
    engine = _load_engine(arguments)
    if images:
        pieces = engine.stream(engine.encode_chat([user_turn(prompt.strip(), images)]), params)
    else:
        pieces = engine.stream(engine.encode(prompt), params)
        print(prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
    finally:
        print()
    return 0


def _open_image(path: Path):
    """A file of one's own, so of any format."""
    from fulmen.data import ImageLimits, open_image
    from fulmen.data.image_files import FORMATS

    return open_image(path, ImageLimits(formats=FORMATS))


def _check_shapes(model: Path, images: list) -> None:
    """Raise UserError for an image that is too thin for the checkpoint's model; one without eyes says so itself."""
    from fulmen.checkpoint import find_checkpoint, load_config
    from fulmen.model import VisionLanguageConfig

    config = load_config(find_checkpoint(model))
    if isinstance(config, VisionLanguageConfig):
        for image in images:
            config.vision.processor().layout(*image.size)


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
    engine = _load_engine(arguments)
    conversation, images = Conversation(engine, system=arguments.system), []
    while True:
        try:
            with _utf8_input():
                text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text == "/exit":
            return 0
        command, _, rest = text.partition(" ")
        if text == "/reset":
            conversation, images = Conversation(engine, system=arguments.system), []
        elif command == "/image":
            _attach(engine, rest.strip(), images)
        elif text:
            _print_reply(conversation, text, params, images)
            images = []


def _attach(engine, name: str, images: list) -> None:
    """Another image for the next line, or why there is none."""
    try:
        if engine.image_processor is None:
            raise UserError("this model takes no images")
        if not name:
            raise UserError("name a file: /image FILE")
        images.append(_open_image(_expanded(name)))
        print(f"[{name} is shown with your next line]")
    except UserError as error:
        print(f"[{error}]")


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot read the image {name}: {error}") from None


def _print_reply(conversation, text: str, params, images: list) -> None:
    """Stream an answer; Ctrl-C leaves it and keeps the conversation, and so does an error the user can mend."""
    print("ai: ", end="", flush=True)
    try:
        with contextlib.closing(conversation.reply(text, params, images)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [left]", end="")
    except UserError as error:
        print(f"[{error}; /reset starts anew]", end="")
    print()


def _sampling_params(arguments: argparse.Namespace):
    from fulmen.serve import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    chosen = {name: getattr(arguments, name) for name in (*names, "frequency_penalty", "seed")}
    return SamplingParams(**chosen, stop=tuple(arguments.stop))


def _load_engine(arguments: argparse.Namespace):
    """For one person, whose turns are all that its memory must hold."""
    import torch

    from fulmen.model import choose_device
    from fulmen.serve import Engine, EngineSettings

    device, settings = choose_device(arguments.device), EngineSettings(max_sequences=1)
    return Engine.load(arguments.path, settings, device=device, dtype=getattr(torch, arguments.dtype))
