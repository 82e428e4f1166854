"""`fulmen serve`."""

import argparse
import asyncio
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from fulmen.cli.parts import DTYPE_HELP, DTYPES, count, verb
from fulmen.config import UserError

GB = 10**9


def _number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    """Reads a number of these bounds; nan lies in none."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, got {text!r:.100}")
        return number

    return read


gigabytes = _number(float, 1 / GB, 1e9)


def _word(text: str) -> str:
    """Not the empty one that a shell makes of a variable that is not set: no key would ask nobody for one."""
    if not text or text != text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, or begin or end with a blank, got {text!r:.100}")
    return text


def add(verbs) -> None:
    parser = verb(
        verbs,
        "serve",
        _serve,
        "answer requests of OpenAI's API, with a chat page at /",
        "fulmen serve runs/quickstart --port 8000",
    )
    parser.add_argument("path", type=Path, help="a checkpoint's folder, or a training run's")
    parser.add_argument(
        "--host", type=_word, default="127.0.0.1", help="address to listen at (default: this machine alone)"
    )
    parser.add_argument(
        "--port", type=_number(int, 0, 65535), default=8000, help="0 takes any that is free (default: 8000)"
    )
    parser.add_argument("--name", help="the model's name in the API (default: the folder's)")
    parser.add_argument("--api-key", type=_word, metavar="KEY", help="ask everybody for it (default: nobody is asked)")
    help_text = "a web page's origin that may call the API; repeatable (default: none but the chat page)"
    parser.add_argument("--cors-origin", action="append", default=[], metavar="URL", help=help_text)
    parser.add_argument(
        "--max-images", type=count, default=16, help="of a request, where the model takes any (default: 16)"
    )
    help_text = "fetch images whose http(s) addresses requests give, public ones alone (default: never)"
    parser.add_argument("--allow-image-urls", action="store_true", help=help_text)
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests in the queue (default: 1024)")
    help_text = "seconds to end answers when stopped (default: 30)"
    parser.add_argument("--grace", type=_number(float, 0, 1e6), default=30, help=help_text)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    parser.add_argument("--dtype", choices=(*DTYPES, "int8"), default="float32", help=DTYPE_HELP)
    parser.add_argument("--memory", type=gigabytes, metavar="GB", help="for everything (default: what is free)")
    memory_arguments(parser)


def memory_arguments(parser) -> None:
    """What decides how an engine divides its memory."""
    parser.add_argument("--max-sequences", type=count, default=64, help="that run at the same time (default: 64)")
    help_text = "tokens of prompt and answer (default: the model's positions, as far as they fit)"
    parser.add_argument("--max-context", type=count, help=help_text)
    help_text = "of prompts in one step (default: 1024, on a GPU 8192)"
    parser.add_argument("--chunk-tokens", type=count, help=help_text)
    help_text = "tokens of a page of keys and values (default: 16, on a GPU 64)"
    parser.add_argument("--page-size", type=count, help=help_text)
    parser.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt anew")


def engine_settings(arguments: argparse.Namespace, **others):
    """`EngineSettings` of those arguments."""
    from fulmen.serve import EngineSettings

    return EngineSettings(
        max_sequences=arguments.max_sequences,
        max_context=arguments.max_context,
        chunk_tokens=arguments.chunk_tokens,
        page_size=arguments.page_size,
        prefix_cache=not arguments.no_prefix_cache,
        **others,
    )


def _serve(arguments: argparse.Namespace) -> int:
    import torch

    from fulmen.model import choose_device
    from fulmen.serve import Engine

    memory = None if arguments.memory is None else round(arguments.memory * GB)
    settings = engine_settings(arguments, memory=memory, max_waiting=arguments.max_waiting)
    with _listen(arguments.host, arguments.port) as listening:
        engine = Engine.load(
            arguments.path,
            settings,
            device=choose_device(arguments.device),
            dtype=getattr(torch, arguments.dtype),
            show_plan=lambda plan: print(plan.table(), flush=True),
        )
        stopped_by = asyncio.run(_run(engine, listening, arguments))
    return 128 + stopped_by if stopped_by else 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket there, before minutes are spent on loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # until then a second server could bind it too, and fail once it has loaded
    except (OSError, TypeError) as error:  # TypeError: a name that cannot be encoded
        listening.close()
        raise UserError(f"cannot listen at {host}:{port}: {error}; give another --host or --port") from None
    return listening


async def _run(engine, listening: socket.socket, arguments: argparse.Namespace) -> int | None:
    from fulmen.serve.server import serve

    host, port = listening.getsockname()[:2]
    name = arguments.name or arguments.path.resolve().name
    shown = f"[{host}]" if ":" in host else host
    return await serve(
        engine,
        listening,
        model_name=name,
        api_key=arguments.api_key,
        cors_origins=arguments.cors_origin,
        max_images=arguments.max_images,
        allow_image_urls=arguments.allow_image_urls,
        grace=arguments.grace,
        when_ready=lambda: print(
            f"{name}: chat at http://{shown}:{port}/, API at http://{shown}:{port}/v1", file=sys.stderr, flush=True
        ),
    )
