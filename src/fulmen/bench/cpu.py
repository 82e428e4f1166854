"""Training and decoding of the quickstart model on this CPU, beside transformers' MiniMax with the same weights.

Steps of both alternate, and with the matrix product that shares are of, so that a machine whose speed drifts slows
all of them; ratios are of one turn, and the median of all turns is printed.
Nothing is timed before the logits of both agree.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import MiniMaxForCausalLM
from transformers.utils import logging

from fulmen.checkpoint import save_model
from fulmen.config import UserError
from fulmen.model import LanguageModel, ModelConfig
from fulmen.ops.lightning import decay_rates, lightning_attention
from fulmen.run.memory import keep_freed_memory

BATCH, LENGTH = 8, 512
PROMPT, STEPS = 64, 64
REPEATS = 15  # of timed turns
MATRIX = 2048
MATRIX_FLOP = 2 * MATRIX**3
CONSOLE = Console()


def bench_train() -> dict:
    """One optimizer step on 8 x 512 tokens, in fp32 and under bf16 autocast."""
    logging.set_verbosity_error()
    keep_freed_memory()  # as `fulmen train` does; it is the process', so transformers has it too
    config = ModelConfig.preset("tiny")
    flops = training_flops(config)
    table = Table("dtype", "ours tokens/s", "theirs", "ratio", "matrix GFLOP/s", "share of it")
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = equal_models(config)
        tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1))
        our_step, their_step = our_training_step(ours, tokens, dtype), their_training_step(theirs, tokens, dtype)
        turns = time_turns((our_step, their_step, matrix_product(dtype)), REPEATS, f"train {dtype}")
        our_rate, their_rate = (
            BATCH * LENGTH / statistics.median(times) for times in list(zip(*turns, strict=True))[:2]
        )
        row = {
            "ours_tokens_per_second": our_rate,
            "transformers_tokens_per_second": their_rate,
            "ratio": statistics.median(theirs / ours for ours, theirs, _ in turns),
            "matrix_gflops": statistics.median(MATRIX_FLOP / seconds for _, _, seconds in turns) / 1e9,
            "share_of_matrix_rate": statistics.median(
                (BATCH * LENGTH * flops / ours) / (MATRIX_FLOP / seconds) for ours, _, seconds in turns
            ),
        }
        results[str(dtype)] = row
        table.add_row(
            str(dtype).removeprefix("torch."),
            f"{our_rate:.0f}",
            f"{their_rate:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['matrix_gflops']:.0f}",
            f"{row['share_of_matrix_rate']:.0%}",
        )
    table.title = f"training, {BATCH} x {LENGTH} tokens a step, {flops / 1e6:.1f} MFLOP a token"
    CONSOLE.print(table)
    return results


def bench_decode() -> dict:
    """Greedy decoding from a short prompt, one token of each sequence a step."""
    config = ModelConfig.preset("tiny")
    table = Table("dtype", "batch", "ours tokens/s", "ms a step", "theirs", "ms a step", "ratio")
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (model.to(dtype).eval() for model in equal_models(config))
        for batch in (1, 16):
            prompt = torch.randint(0, config.vocab_size, (batch, PROMPT))
            both = (our_decoding(ours, prompt), their_decoding(theirs, prompt))
            pairs = time_turns(both, max(3, REPEATS // 3), f"decode B={batch}")
            our_step, their_step = (statistics.median(times) / STEPS for times in zip(*pairs, strict=True))
            row = {
                "ours_tokens_per_second": batch / our_step,
                "transformers_tokens_per_second": batch / their_step,
                "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
            }
            results[f"{dtype} B={batch}"] = row
            table.add_row(
                str(dtype).removeprefix("torch."),
                str(batch),
                f"{batch / our_step:.0f}",
                f"{our_step * 1e3:.2f}",
                f"{batch / their_step:.0f}",
                f"{their_step * 1e3:.2f}",
                f"{row['ratio']:.1f}",
            )
    table.title = f"decoding after {PROMPT} tokens, {STEPS} steps"
    CONSOLE.print(table)
    return results


def bench_memory() -> dict:
    """Peak memory that forward and backward of chunked lightning attention add, each length in its own process."""
    table = Table("tokens", "peak MB added", "q, k, v, out and gradients", "every state")
    results = {}
    for length in (8192, 65536):
        command = [sys.executable, "-m", "fulmen.bench.cpu", str(length)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        tensors, states = 8 * length * 4 * 64 * 4, length * 4 * 64 * 64 * 4
        results[str(length)] = {"peak_bytes": peak, "tensor_bytes": tensors, "every_state_bytes": states}
        table.add_row(f"{length}", f"{peak / 1e6:.0f}", f"{tensors / 1e6:.0f}", f"{states / 1e6:.0f}")
    table.title = "chunked lightning attention, forward + backward, 4 heads of 64, fp32"
    CONSOLE.print(table)
    return results


def equal_models(config: ModelConfig) -> tuple[LanguageModel, MiniMaxForCausalLM]:
    """Our model and transformers' with the same weights; stops if their logits differ."""
    torch.manual_seed(0)
    ours = LanguageModel(config)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder) / "model", dialect="transformers")
        theirs = MiniMaxForCausalLM.from_pretrained(Path(folder) / "model")
    tokens = torch.randint(0, config.vocab_size, (2, 300))
    with torch.no_grad():
        difference = (ours(tokens) - theirs.eval()(tokens).logits).abs().max().item()
    if not difference < 1e-4:
        raise UserError(f"the logits of both differ by {difference:.2g}, so nothing is timed")
    return ours, theirs


def our_training_step(model: LanguageModel, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    inputs, targets = tokens[:, :-1].reshape(1, -1), tokens[:, 1:].reshape(1, -1)
    cu_seqlens = torch.arange(0, inputs.numel() + 1, LENGTH, dtype=torch.int32)

    def loss() -> torch.Tensor:
        result = model.loss(inputs, targets, cu_seqlens=cu_seqlens)
        return result.nll / result.targets + 0.01 * result.balance

    return training_step(model, loss, dtype)


def their_training_step(model: MiniMaxForCausalLM, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.01

    def loss() -> torch.Tensor:
        # `shift_labels` takes targets that are shifted already, so that both learn from the same 512 of each row.
        labels = {"labels": targets, "shift_labels": targets}
        return model(inputs, **labels, use_cache=False, output_router_logits=True).loss

    return training_step(model.train(), loss, dtype)


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_decoding(model: LanguageModel, prompt: torch.Tensor) -> Callable[[], float]:
    @torch.inference_mode()
    def run() -> float:
        cache = model.new_cache(len(prompt))
        token = model(prompt, cache=cache)[:, -1:].argmax(-1)
        started = time.perf_counter()
        for _ in range(STEPS):
            token = model(token, cache=cache)[:, -1:].argmax(-1)
        return time.perf_counter() - started

    return run


def their_decoding(model: MiniMaxForCausalLM, prompt: torch.Tensor) -> Callable[[], float]:
    @torch.inference_mode()
    def run() -> float:
        out = model(prompt, use_cache=True)
        started = time.perf_counter()
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - started

    return run


def time_turns(calls: Sequence[Callable], repeats: int, what: str) -> list[tuple[float, ...]]:
    """Seconds of each call, in turn; a callable that returns seconds measures itself. Two turns warm up."""
    turns = []
    for turn in track(range(repeats + 2), what, transient=True, console=CONSOLE):
        seconds = tuple(_seconds(call) for call in calls)
        if turn >= 2:
            turns.append(seconds)
    return turns


def _seconds(call: Callable) -> float:
    started = time.perf_counter()
    measured = call()
    return time.perf_counter() - started if measured is None else measured


def matrix_product(dtype: torch.dtype) -> Callable[[], float]:
    """A large matrix product of MATRIX_FLOP operations: seconds, the median of 10."""
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    return lambda: statistics.median(_seconds(lambda: (a @ b, None)[1]) for _ in range(10))


def training_flops(config: ModelConfig) -> float:
    """Floating-point operations of products per token: 6 per active weight and head weight, and attention's own.

    Attention: lightning in blocks of 64 (scores, values, state, read), softmax over half of the 512 tokens; three
    times the forward pass.
    """
    inner, layers = config.attention_size, config.layers
    lightning = 4 * 64 * inner + 4 * config.head_dim * inner
    softmax = 4 * (LENGTH / 2) * inner
    attention = layers.count("L") * lightning + layers.count("S") * softmax
    return 6 * (config.count_parameters().active + config.vocab_size * config.hidden_size) + 3 * attention


def peak_memory_here(length: int) -> int:
    """Bytes by which one forward and backward pass raises this process' peak memory."""
    shape = (1, length, 4, 64)
    rates = decay_rates(4, 0, 8)

    def peak() -> int:
        # Not ru_maxrss, which a child process takes over from its parent.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    # A short pass first, so that the library's own start-up memory is not counted.
    for tokens in (64, length):
        before = peak()
        q, k, v = (torch.randn(1, tokens, *shape[2:], requires_grad=True) for _ in range(3))
        lightning_attention(q, k, v, rates)[0].sum().backward()
    return peak() - before


TABLES = {"train": bench_train, "decode": bench_decode, "memory": bench_memory}

if __name__ == "__main__":
    print(peak_memory_here(int(sys.argv[1])))
