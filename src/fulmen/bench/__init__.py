"""`fulmen bench`: ours beside every peer that is installed, checked before it is timed.

Each module has `TABLES`, functions by name, each of which prints a table and gives back its numbers, and may have
`EXTRA_TABLES`, which run only where they are named. Peers are optional; times of one table are of one run on one
machine, and only their ratios should be compared with anything. `plots.py` draws pictures from results.
"""

import importlib
import json
import traceback
from pathlib import Path

from fulmen.config import UserError

NAMES = {
    "lightning": "lightning attention, forward and backward (a GPU)",
    "decode": "the next token's kernel over slots of a pool, and batches of unlike lengths (a GPU)",
    "experts": "the mixture of experts beside its bare products (a GPU)",
    "model": "prefill and decoding of a whole model (a GPU)",
    "train": "training steps against the samples' length (a GPU)",
    "serve": "many clients of one engine, and the prefix cache",
    "cpu": "training and decoding of the quickstart model on this CPU",
}
ANYWHERE = ("serve", "cpu")
"""Those that need no GPU."""
PEERS = ("transformers", "triton", "fla-core", "lightning-attn")


def run(name: str, only: str | None = None, path: Path | None = None) -> None:
    """Print the tables of a benchmark, or the one named `only`; write machine and numbers to `path` as JSON.

    A table that fails does not take the others along. Raises UserError for a GPU's benchmark without a GPU, a table
    that there is not, and, at the end, for tables that failed: results are wrong, or an error whose traceback is shown.
    """
    import torch

    from fulmen.run.files import write_atomic
    from fulmen.run.machine import describe_machine

    if name not in ANYWHERE and not torch.cuda.is_available():
        raise UserError(f"fulmen bench {name} needs a CUDA device, and there is none; fulmen bench cpu does not")
    try:
        module = importlib.import_module(f"fulmen.bench.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"fulmen bench {name} needs the package {error.name}") from None
    tables, extra = module.TABLES, getattr(module, "EXTRA_TABLES", {})
    if only is not None and only not in tables | extra:
        raise UserError(f"fulmen bench {name} has no table {only!r}; there are {', '.join(tables | extra)}")
    machine = describe_machine(*PEERS, device="cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    print(" ".join(f"{key}={value}" for key, value in machine.items()), flush=True)
    results, failures = {}, {}
    for table in tables if only is None else (only,):
        print(f"{table}:", flush=True)
        try:
            results[table] = (tables | extra)[table]()
        except UserError as error:
            failures[table] = str(error)
        except Exception as error:
            traceback.print_exc()
            failures[table] = type(error).__name__
        if path is not None:  # after each, so that whatever ends the process leaves what there is
            write_atomic(path, json.dumps({"machine": machine} | results, indent=2) + "\n")
    if failures:
        raise UserError("; ".join(f"table {table}: {text}" for table, text in failures.items()))
