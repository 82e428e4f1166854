"""Prefill and decoding of a model of 950 M parameters in bf16, beside transformers' `minimax` with the same weights."""

import functools
import tempfile
from pathlib import Path

import torch

from fulmen.bench.gpu import attempt, copy_rate, free_memory, quotient, relative_error, require, seconds, show
from fulmen.checkpoint import save_model
from fulmen.model import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=16,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    rotary_dim=128,
    num_experts=16,
    expert_size=1024,
    max_positions=2**20,
)
PREFILLS = ((1, 512), (1, 2048), (1, 16384), (8, 4096), (1, 65536))
BATCHES, PROMPT, STEPS = (1, 8, 32), 128, 32


@functools.cache
def models() -> tuple[LanguageModel, torch.nn.Module | None]:
    """Ours, and transformers' with the same weights if it is installed; stops if their logits differ in fp32.

    Made once for all tables.
    """
    torch.manual_seed(0)
    with torch.device("cuda"):  # a billion normal numbers take a CPU half a minute
        ours = LanguageModel(CONFIG)
    ours = ours.cuda().eval()
    try:
        from transformers import MiniMaxForCausalLM
    except ImportError:
        return ours.bfloat16(), None
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder) / "model", dialect="transformers")
        theirs = MiniMaxForCausalLM.from_pretrained(Path(folder) / "model").cuda().eval()
    tokens = torch.randint(CONFIG.vocab_size, (1, 300), device="cuda")
    with torch.no_grad():
        require({"logits beside transformers'": relative_error(ours(tokens), theirs(tokens).logits)}, 1e-3)
    return ours.bfloat16(), theirs.bfloat16()


@torch.inference_mode()
def bench_prefill() -> list[dict]:
    """Tokens a second until the prompt's last logits."""
    ours, theirs = models()
    rows = []
    for batch, length in PREFILLS:
        tokens = torch.randint(CONFIG.vocab_size, (batch, length), device="cuda")

        def prefill(tokens=tokens):
            hidden, _ = ours.hidden(tokens, cache=ours.new_cache(len(tokens)))
            ours.logits(hidden[:, -1])

        line = {"prompt": f"{batch} x {length}", "ours": batch * length / seconds(prefill)}
        if theirs is not None:
            line["transformers"] = attempt(lambda tokens=tokens: tokens.numel() / their_prefill(theirs, tokens))
            line |= with_ratio(line["ours"], line["transformers"])
        rows.append(show(line))
        free_memory()
    return rows


@torch.inference_mode()
def bench_decoding() -> list[dict]:
    """Milliseconds of a greedy step after a short prompt, and the share of what moving its bytes would take."""
    ours, theirs = models()
    rate, rows = copy_rate(), []
    for batch in BATCHES:
        prompt = torch.randint(CONFIG.vocab_size, (batch, PROMPT), device="cuda")
        line = {"batch": batch, "ours": our_step(ours, prompt)}
        line["share of the copy rate"] = bytes_moved(batch) / rate * 1e3 / line["ours"]
        if theirs is not None:
            line["transformers"] = attempt(lambda prompt=prompt: their_step(theirs, prompt))
            line |= with_ratio(line["transformers"], line["ours"])
        rows.append(show(line))
        free_memory()
    return rows


def with_ratio(better: float | str, worse: float | str) -> dict[str, float]:
    """Nothing where one of them failed."""
    ratio = quotient(better, worse)
    return {} if ratio is None else {"ratio": ratio}


def their_prefill(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    return seconds(lambda: model(tokens, use_cache=True, logits_to_keep=1), repeats=3, warmup=1)


def our_step(model: LanguageModel, prompt: torch.Tensor) -> float:
    cache = model.new_cache(len(prompt))
    token = model(prompt, cache=cache)[:, -1:].argmax(-1)

    def steps() -> None:
        nonlocal token
        for _ in range(STEPS):
            token = model(token, cache=cache)[:, -1:].argmax(-1)

    return seconds(steps, repeats=5, warmup=2) / STEPS * 1e3


def their_step(model: torch.nn.Module, prompt: torch.Tensor) -> float:
    out = model(prompt, use_cache=True)

    def steps() -> None:
        nonlocal out
        for _ in range(STEPS // 4):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    return seconds(steps, repeats=3, warmup=1) / (STEPS // 4) * 1e3


def bytes_moved(batch: int) -> float:
    """Of a step: the weights that its tokens use, each once, in bf16, states read and written, keys and values read."""
    c = CONFIG
    count = c.count_parameters()
    experts = c.num_layers * c.num_experts * 3 * c.hidden_size * c.expert_size
    shared = count.total - count.embeddings - experts
    used = 1 - (1 - c.experts_per_token / c.num_experts) ** batch  # of the experts, were they chosen evenly
    head = c.vocab_size * c.hidden_size
    memory = c.estimate_memory(context=PROMPT + 4 * STEPS, batch=batch, dtype="bfloat16")
    return 2 * (shared + used * experts + head) + 2 * memory.state + memory.key_values


TABLES = {"prefill": bench_prefill, "decoding": bench_decoding}
