"""`fulmen info`, `convert` and `make-tiny`."""

import argparse
from pathlib import Path

from fulmen.cli.parts import DTYPES, count, model_config, verb

DIALECTS = ("original", "transformers")


def add(verbs) -> None:
    parser = verb(
        verbs,
        "info",
        _info,
        "print a model's sizes and the memory that it needs",
        "fulmen info minimax-text-01 --context 1000000 --batch 1 --dtype int8",
    )
    parser.add_argument("model", help="a named size, a checkpoint's folder or a training run's")
    parser.add_argument("--context", type=count, default=8192, help="tokens per sequence (default: 8192)")
    parser.add_argument("--batch", type=count, default=1, help="sequences at a time (default: 1)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="bfloat16", help="(default: bfloat16)"
    )
    parser = verb(
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
    parser = verb(
        verbs,
        "make-tiny",
        _make_tiny,
        "write a tiny random checkpoint with a tokenizer, for tests",
        "fulmen make-tiny tiny-minimax --dialect transformers",
    )
    parser.add_argument("path", type=Path, help="folder to write")
    parser.add_argument("--dialect", choices=DIALECTS, default="original", help="(default: original)")
    parser.add_argument("--vision", action="store_true", help="a vision-language model, with a small image encoder")


def _info(arguments: argparse.Namespace) -> int:
    from fulmen.model import describe

    config = model_config(arguments.model)
    print(describe(config, context=arguments.context, batch=arguments.batch, dtype=arguments.dtype))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from fulmen.checkpoint import find_checkpoint, load_generation_config, load_model, save_model
    from fulmen.data import Tokenizer

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

    make_tiny(arguments.path, dialect=arguments.dialect, vision=arguments.vision)
    print(f"wrote {arguments.path} in the {arguments.dialect} dialect")
    return 0
