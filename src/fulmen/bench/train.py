"""Training steps of a model of 950 M parameters against the samples' length: hybrid, all softmax, all lightning.

A step is forward, backward, clipping and AdamW on fp32 weights under bf16 autocast; its tokens are cut into micro
batches. Beyond `KEPT` tokens a sample only each layer's input is kept for the backward pass.
"""

import dataclasses
import functools

import torch

from fulmen.bench.gpu import matrix_rate, seconds, show
from fulmen.bench.model import CONFIG
from fulmen.model import LanguageModel, ModelConfig

LENGTHS = tuple(2**i for i in range(10, 19))  # 1K..256K
PLANS = {"hybrid": "LLLLLLLS", "softmax": "S", "lightning": "L"}
STEP, MICRO, KEPT = 2**17, 2**15, 2**15
SOFTMAX_UP_TO = 2**16  # tokens: beyond, all softmax takes minutes a step


def bench_lengths() -> list[dict]:
    """Tokens a second and the memory at most.

    The share of the matrix rate counts the products that the model needs, and none twice.
    """
    rate = matrix_rate()
    return [line for name in PLANS for line in bench_plan(name, rate)]


def bench_plan(name: str, rate: float) -> list[dict]:
    """All lengths with one plan of layers."""
    config = dataclasses.replace(CONFIG, layer_plan=PLANS[name])
    torch.manual_seed(0)
    model = LanguageModel(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = []
    for length in LENGTHS if name != "softmax" else [n for n in LENGTHS if n <= SOFTMAX_UP_TO]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        line = {"layers": name, "length": length, "activations": "kept" if length <= KEPT else "computed again"}
        step = functools.partial(training_step, model, optimizer, length)
        try:
            rate_here = max(STEP, length) / seconds(step, repeats=2, warmup=1)
            line |= {"tokens a second": rate_here, "share of the matrix rate": rate_here * flops(config, length) / rate}
            line["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        except torch.OutOfMemoryError:
            line["tokens a second"] = "out of memory"
            optimizer.zero_grad(set_to_none=True)
        rows.append(show(line))
    return rows


def training_step(model: LanguageModel, optimizer: torch.optim.Optimizer, length: int) -> None:
    micro, step = max(MICRO, length), max(STEP, length)
    for _ in range(step // micro):
        tokens = torch.randint(model.config.vocab_size, (1, micro + 1), device="cuda")
        borders = torch.arange(0, micro + 1, length, dtype=torch.int32)
        with torch.autocast("cuda", torch.bfloat16):
            part = model.loss(tokens[:, :-1], tokens[:, 1:], cu_seqlens=borders, checkpoint_layers=length > KEPT)
            loss = part.nll / step + 0.01 * part.balance
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def flops(config: ModelConfig, length: int) -> float:
    """Operations of products a token, three times the forward pass: 6 per active weight and head weight, and attention.

    Lightning as blocks of 64 (scores, values, state, read-out), softmax over half of the sample.
    """
    inner, layers = config.attention_size, config.layers
    lightning, softmax = 4 * 64 * inner + 4 * config.head_dim * inner, 4 * (length / 2) * inner
    attention = layers.count("L") * lightning + layers.count("S") * softmax
    return 6 * (config.count_parameters().active + config.vocab_size * config.hidden_size) + 3 * attention


TABLES = {"lengths": bench_lengths}
