"""Training steps of a model of 950 M parameters against the samples' length: hybrid, all softmax, all lightning.

A step is forward, backward, clipping and AdamW on fp32 weights under bf16 autocast; its tokens are cut into micro
batches. Beyond `KEPT` tokens a sample only each layer's input is kept for the backward pass.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from fulmen.bench.gpu import OUT_OF_MEMORY, attempt, free_memory, matrix_rate, quotient, seconds, show
from fulmen.bench.model import CONFIG
from fulmen.checkpoint.config import config_keys
from fulmen.model import LanguageModel, ModelConfig

LENGTHS = tuple(2**i for i in range(10, 19))  # 1K..256K
PLANS = {"softmax": "S", "hybrid": "LLLLLLLS", "lightning": "L"}
STEP, MICRO, KEPT = 2**17, 2**16, 2**16
SOFTMAX_UP_TO = 2**16  # tokens: beyond, all softmax takes minutes a step
PARTS_LENGTHS = (2**13, 2**16)
MEMORY_LENGTH, SHORTEST = 2**18, 2**13
PARTS = (
    "lightning attention",
    "softmax attention",
    "experts",
    "norms, residuals, embedding",
    "head and loss",
    "optimizer and clipping",
)
LIGHTNING, SOFTMAX, EXPERTS, REST, HEAD, OPTIMIZER = PARTS


def bench_lengths() -> list[dict]:
    """Tokens a second and the memory at most, and the hybrid's tokens a second over those of all softmax.

    The share of the matrix rate counts the products that the model needs, and none twice; the rate is measured right
    after the steps, as the card's clock drifts under load.
    """
    rows, softmax = [], {}
    for name in PLANS:
        rows += bench_plan(name, softmax if name == "hybrid" else {})
        if name == "softmax":
            softmax = {line["length"]: line["tokens a second"] for line in rows}
    return rows


def bench_plan(name: str, others: dict[int, float | str]) -> list[dict]:
    """All lengths with one plan of layers, beside others' tokens a second by length."""
    model, optimizer = trained_model(dataclasses.replace(CONFIG, layer_plan=PLANS[name]))
    rows = []
    for length in LENGTHS if name != "softmax" else [n for n in LENGTHS if n <= SOFTMAX_UP_TO]:
        line = {"layers": name, "length": length, "activations": "kept" if length <= KEPT else "computed again"}
        line |= time_step(functools.partial(training_step, model, optimizer, length), max(STEP, length), repeats=2)
        rate = matrix_rate()
        optimizer.zero_grad(set_to_none=True)
        share = quotient(line["tokens a second"], rate / flops(model.config, length))
        ratio = quotient(line["tokens a second"], others.get(length))
        line |= {} if share is None else {"share of the matrix rate": share, "matrix TFLOP/s": rate / 1e12}
        rows.append(show(line | ({} if ratio is None else {"hybrid / softmax": ratio})))
    del model, optimizer
    free_memory()
    return rows


def time_step(step: Callable, tokens: int, repeats: int) -> dict:
    """Tokens a second and the most memory of a step, or why it failed and with how much memory."""

    def rate() -> float:
        step()  # the first one makes the optimizer's state and may try several kernels
        torch.cuda.reset_peak_memory_stats()
        return tokens / seconds(step, repeats=repeats, warmup=0)

    free_memory()
    torch.cuda.reset_peak_memory_stats()
    found = attempt(rate)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"tokens a second": found, "failed at GB" if isinstance(found, str) else "peak GB": peak}


def trained_model(config: ModelConfig) -> tuple[LanguageModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    with torch.device("cuda"):  # a billion normal numbers take a CPU half a minute
        model = LanguageModel(config)
    model = model.cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def training_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, length: int, mark: Callable[[str], None] = lambda part: None
) -> None:
    """One step; `mark` is told which part of it begins."""
    micro, step, device = max(MICRO, length), max(STEP, length), model.norm.weight.device
    for _ in range(step // micro):
        mark(REST)
        tokens = torch.randint(model.config.vocab_size, (1, micro + 1), device=device)
        borders = torch.arange(0, micro + 1, length, dtype=torch.int32)
        with torch.autocast(device.type, torch.bfloat16):
            part = model.loss(tokens[:, :-1], tokens[:, 1:], cu_seqlens=borders, checkpoint_layers=length > KEPT)
            loss = part.nll / step + 0.01 * part.balance
        loss.backward()
    mark(OPTIMIZER)
    update(model, optimizer)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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


def bench_parts() -> list[dict]:
    """Share of a hybrid's training step by part, forward and backward together; experts with their residual sum."""
    model, optimizer = trained_model(CONFIG)
    rows = []
    for length in PARTS_LENGTHS:
        free_memory()
        found = attempt(functools.partial(parts_row, model, optimizer, length))
        optimizer.zero_grad(set_to_none=True)
        rows.append(show({"length": length} | ({"failed": found} if isinstance(found, str) else found)))
    return rows


def parts_row(model: LanguageModel, optimizer: torch.optim.Optimizer, length: int) -> dict[str, float]:
    """The shares, and how long a step takes without the hooks and with them."""
    bare = seconds(functools.partial(training_step, model, optimizer, length), repeats=2, warmup=1)
    times = time_parts(model, optimizer, length)
    total = sum(times.values())
    line = {"milliseconds": bare * 1e3, "milliseconds in parts": total}
    return line | {part: times[part] / total for part in PARTS}


class Timeline:
    """Who began when, on a GPU's own clock: each part lasts until the next begins."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.moments: list[tuple[str, object]] = []

    def __call__(self, part: str) -> None:
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.moments.append((part, moment))

    @property
    def part(self) -> str:
        """What runs now."""
        return self.moments[-1][0]

    def totals(self) -> dict[str, float]:
        """Milliseconds of each part, until the last moment."""
        if self.on_gpu:
            torch.cuda.synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self.moments, self.moments[1:], strict=False):
            totals[part] += begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
        return totals


def time_parts(model: LanguageModel, optimizer: torch.optim.Optimizer, length: int) -> dict[str, float]:
    """Milliseconds of a training step by part."""
    timeline = Timeline(model.norm.weight.is_cuda)
    # Recomputed layers run to their end, for otherwise they would leave by an exception, past the hooks.
    with watched(model, timeline), set_checkpoint_early_stop(False):
        training_step(model, optimizer, length, timeline)
    timeline("end")
    return timeline.totals()


@contextlib.contextmanager
def watched(model: LanguageModel, timeline: Timeline) -> Iterator[None]:
    """Let attention, experts and head tell the timeline when they begin and end, forward and backward."""
    handles = []
    for layer in model.layers:
        mixer = LIGHTNING if layer.is_lightning else SOFTMAX
        for module, part in ((layer, REST), (layer.self_attn, mixer), (layer.block_sparse_moe, EXPERTS)):
            handles += watch(module, part, timeline, backward=module is not layer)
    handles.append(model.norm.register_forward_hook(functools.partial(_head_begins, timeline)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(module: nn.Module, part: str, timeline: Timeline, *, backward: bool) -> list:
    """Hooks for one module.

    A layer whose input alone is kept runs its forward pass in the middle of a part's backward pass, and that part goes
    on afterwards. A tensor's hook is called when its gradient is known: the output's at the beginning of the module's
    backward pass, the input's at its end.
    """
    interrupted = []

    def before(module, arguments) -> None:
        interrupted.append(timeline.part)
        if backward and arguments[0].requires_grad:
            arguments[0].register_hook(lambda gradient: timeline(REST))
        timeline(part)

    def after(module, arguments, output) -> None:
        timeline(interrupted.pop())
        first = output[0] if isinstance(output, tuple) else output
        if backward and first.requires_grad:
            first.register_hook(lambda gradient: timeline(part))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _head_begins(timeline: Timeline, module: nn.Module, arguments: tuple, output: Tensor) -> None:
    timeline(HEAD)
    output.register_hook(lambda gradient: timeline(REST))


def bench_memory() -> list[dict]:
    """A training step of one sample, layers computed again: the most memory and tokens a second, ours beside theirs.

    Theirs is transformers' `minimax` of equal size with gradient checkpointing and without the balance loss; its length
    is halved until it fits, and ours is measured at that length too.
    """
    rows = [memory_row("transformers", length := MEMORY_LENGTH)]
    while rows[-1]["tokens a second"] == OUT_OF_MEMORY and length > SHORTEST:
        length //= 2
        rows.append(memory_row("transformers", length))
    lengths = dict.fromkeys((MEMORY_LENGTH, length))
    return rows + [memory_row("ours", length) for length in lengths]


def memory_row(name: str, length: int) -> dict:
    """One model made, trained for two steps and forgotten."""
    made = attempt(lambda: {"ours": our_step, "transformers": their_step}[name](length))
    line = {"model": name, "length": length}
    line |= {"tokens a second": made} if isinstance(made, str) else time_step(made, length, repeats=1)
    del made
    free_memory()
    return show(line)


def our_step(length: int) -> Callable[[], None]:
    model, optimizer = trained_model(CONFIG)

    def step() -> None:
        tokens = torch.randint(CONFIG.vocab_size, (1, length + 1), device=model.norm.weight.device)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            part = model.loss(tokens[:, :-1], tokens[:, 1:], checkpoint_layers=True)
            loss = part.nll / length + 0.01 * part.balance
        loss.backward()
        update(model, optimizer)

    return step


def their_step(length: int) -> Callable[[], None]:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    keys = config_keys(CONFIG, "transformers", dtype=torch.float32, eos_id=None, bos_id=None)
    with torch.device("cuda"):
        model = MiniMaxForCausalLM(MiniMaxConfig(**keys))
    model = model.cuda().float().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Its grouped products take no notice of autocast and would run in fp32; its loop over experts does.
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(CONFIG.vocab_size, (1, length + 1), device=model.lm_head.weight.device)
        labels = {"labels": tokens[:, 1:], "shift_labels": tokens[:, 1:].contiguous()}
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(tokens[:, :-1], **labels, use_cache=False).loss
        loss.backward()
        update(model, optimizer)

    return step


TABLES = {"lengths": bench_lengths, "parts": bench_parts, "memory": bench_memory}
