"""What int8 costs and saves: size, speed, and bits per byte of held-out text, for a training run of this machine.

    python bench/int8.py runs/quickstart

The text is the one that the run held out. Times are medians of steps that take turns, so that a busy machine slows all.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from fulmen.checkpoint import load_model
from fulmen.config import load_recipe
from fulmen.data import Batch, Tokenizer, held_out_batches, read_documents, split
from fulmen.evals.text import bits_per_byte
from fulmen.model import LanguageModel
from fulmen.run.machine import describe_machine
from fulmen.train.recipe import TrainRecipe
from record import write_results

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
BATCHES, STEPS, PROMPT = (1, 16), 40, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a training run's folder")
    run = parser.parse_args().run
    models = {dtype: load_model(run / "checkpoint", dtype=dtype) for dtype in DTYPES}
    tokenizer = Tokenizer.load(run / "checkpoint")
    batches, lengths = held_out(run, tokenizer), tokenizer.byte_lengths()
    rows = [
        {"dtype": name(dtype), "MB": megabytes(model), "bits per byte": bits_per_byte(model, batches, lengths)}
        for dtype, model in models.items()
    ]
    for row, *times in zip(rows, *(decode_times(list(models.values()), batch) for batch in BATCHES), strict=True):
        row |= {f"decoding {batch}, ms": time * 1e3 for batch, time in zip(BATCHES, times, strict=True)}
    for row, seconds in zip(rows, prefill_times(list(models.values())), strict=True):
        row[f"prompt of {PROMPT}, ms"] = seconds * 1e3
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in row.items()))
    print(f"wrote {write_results('int8', describe_machine(device='cpu'), {'int8': rows})}")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def megabytes(model: LanguageModel) -> float:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e6


def held_out(run: Path, tokenizer: Tokenizer) -> list[Batch]:
    """The run's own held-out text."""
    recipe = load_recipe(run / "recipe.toml", TrainRecipe)
    documents = read_documents(recipe.data.sources, text_field=recipe.data.text_field)
    shape = {"sequence_length": recipe.data.sequence_length, "batch_tokens": 8192}
    text = split(documents, recipe.data.held_out)[1]
    return held_out_batches(text, tokenizer, max_tokens=recipe.data.held_out_tokens, **shape)


@torch.inference_mode()
def decode_times(models: list[LanguageModel], batch: int) -> list[float]:
    """Seconds of a token of each of `batch` sequences."""
    caches, token = [model.new_cache(batch) for model in models], torch.full((batch, 1), 5)
    for model, cache in zip(models, caches, strict=True):
        model(token.expand(-1, 64), cache=cache)
    return in_turns([lambda m=m, c=c: m(token, cache=c) for m, c in zip(models, caches, strict=True)], STEPS)


@torch.inference_mode()
def prefill_times(models: list[LanguageModel]) -> list[float]:
    tokens = torch.full((1, PROMPT), 5)
    return in_turns([lambda m=m: m.hidden(tokens, cache=m.new_cache(1)) for m in models], 5)


def in_turns(calls: list, count: int) -> list[float]:
    """The median seconds of each call, which has been made once before."""
    times = [[] for _ in calls]
    for turn in range(count + 1):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if turn:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
