"""Attention of rows that are cut over ranks: LASP+ beside serial LASP, the ring, and both as rows get longer."""

import functools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.bench.gpu import free_memory
from fulmen.model import ModelConfig
from fulmen.model.lightning import LightningAttention
from fulmen.ops.lightning import decay_rates
from fulmen.parallel import Cut
from fulmen.parallel.context import SliceContext
from fulmen.parallel.lasp import lasp_attention, serial_lasp_attention
from fulmen.parallel.ring import ring_attention
from ranks import planned
from ranks.timing import both, finish, powers, random, timed

SIZES = {"cpu": dict(tokens=1024, heads=4, width=64), "cuda": dict(tokens=65536, heads=32, width=128)}
LENGTHS = {"cpu": (2**11, 2**13), "cuda": tuple(2**power for power in (16, 18, 20, 22))}
RING_TOKENS = {"cpu": (256, 512, 1024), "cuda": (2**13, 2**14, 2**15)}
SAMPLES = 3
"""Of a row, equal ones: on any number of ranks some cross a border."""
RING_UP_TO = 2**20
LAYER = {"cpu": "tiny", "cuda": "7b"}
"""Whose heads and sizes longer rows have."""
MIDDLE = {"cpu": 0, "cuda": 16}
"""Which of its layers: the deeper one lies, the slower its heads forget, and the more tokens a state reaches."""
REPEATS = 50
"""Of LASP, whose steps are short."""
ENOUGH = 2.0
"""Seconds of a step from which it is timed once."""


def lasp(device: torch.device) -> list[dict]:
    """One sample over 1, 2, ... ranks, each with as many tokens; forward, since serial LASP has no backward here."""
    sizes, rows = SIZES[device.type], []
    for ranks in powers(dist.get_world_size()):
        group = first_ranks(ranks)
        if dist.get_rank() < ranks:
            cut = Cut((0, sizes["tokens"] * ranks), ranks)
            qkv = random(device, 1, sizes["tokens"], sizes["heads"], 3, sizes["width"])
            rates = decay_rates(sizes["heads"], 0, 8).to(device)
            row = {"ranks": ranks}
            for name, attention in (("LASP+", lasp_attention), ("serial", serial_lasp_attention)):
                step = torch.no_grad()(lambda f=attention, a=(qkv, rates, cut, group): f(*a))
                row[name] = timed(step, device, group, REPEATS)
            rows.append(row)
        dist.barrier()
    return rows


def ring(device: torch.device) -> list[dict]:
    """One sample over all ranks, keys travelling under the computation or before it, plain and balanced cut."""
    return [row for tokens in RING_TOKENS[device.type] for row in _ring_rows(device, tokens)]


def _ring_rows(device: torch.device, tokens: int) -> list[dict]:
    """With so many tokens of each rank."""
    sizes, ranks, rows = SIZES[device.type], dist.get_world_size(), []
    for balanced, overlap in ((False, False), (False, True), (True, True)):
        cut = Cut((0, tokens * ranks), ranks, balanced)
        qkv = [random(device, 1, tokens, sizes["heads"], sizes["width"]) for _ in range(3)]
        step = lambda a=(*qkv, cut, dist.group.WORLD), o=overlap: both(ring_attention(*a, overlap=o))  # noqa: E731
        row = {"tokens of a rank": tokens, "cut": "balanced" if balanced else "plain", "overlap": overlap}
        rows.append(row | timed(step, device))
    if device.type == "cpu":
        # By the times of the same cut: without overlap all that travels is waited for.
        rows[1]["hidden"] = (rows[0]["ms"] - rows[1]["ms"]) / rows[0]["travelling, ms"]
        rows[0]["hidden"], rows[2]["hidden"] = 0.0, None
    return rows


def lengths(device: torch.device) -> list[dict]:
    """Packed rows of more and more tokens on 1, 2, ... ranks, forward and backward: ms, and how much of n times one
    rank's speed n ranks have. None: does not fit."""
    rows = []
    config = ModelConfig.preset(LAYER[device.type])
    for what, step_of, plan_of, most in (
        ("lightning layer", _layer_step, planned.lightning_layer, LENGTHS[device.type][-1]),
        ("ring attention", _ring_step, planned.ring, RING_UP_TO),
    ):
        memory = 0.0  # bytes of a rank for each of its tokens, as measured before
        for length in (n for n in LENGTHS[device.type] if n <= most):
            line, alone = {"what": what, "tokens": length}, None
            for ranks in powers(dist.get_world_size()):
                ms = None
                if memory * length / ranks <= room(device):
                    ms, peak = _milliseconds(step_of, device, length, ranks)
                    memory = max(memory, peak * ranks / length)
                alone = ms if ranks == 1 else alone
                line[f"{ranks} ranks, ms"] = ms
                if ms and device.type == "cuda":
                    line[f"{ranks} ranks, planned ms"] = plan_of(config, length, SAMPLES, ranks)
                if ranks > 1 and ms and alone:
                    line[f"{ranks} ranks, efficiency"] = alone / (ranks * ms)
            rows.append(line)
            if dist.get_rank() == 0:
                print(line, flush=True)
    return rows


@functools.lru_cache
def first_ranks(ranks: int) -> dist.ProcessGroup:
    """The first so many; all ranks call it at the same time."""
    return dist.new_group(list(range(ranks)))


def room(device: torch.device) -> float:
    """Bytes that a step may take."""
    return 0.9 * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def _milliseconds(step_of: Callable, device: torch.device, length: int, ranks: int) -> tuple[float, float]:
    """Of the slowest of the first `ranks`, and the most bytes that one of them has."""
    group, found, peak = first_ranks(ranks), 0.0, 0.0
    if dist.get_rank() < ranks:
        step = step_of(device, length, ranks, group)
        step()
        finish(device)
        started = time.perf_counter()
        step()
        finish(device)
        # All ranks decide alike, or some would wait for others in vain.
        once = _most(time.perf_counter() - started, group)
        found = 1e3 * once if once > ENOUGH else timed(step, device, group)["ms"]
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        del step
    if device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats(device)
    return _most(found, None), _most(peak, None)


def _most(value: float, group: dist.ProcessGroup | None) -> float:
    most = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return most.item()


def _borders(length: int) -> tuple[int, ...]:
    return tuple(length * place // SAMPLES for place in range(SAMPLES + 1))


def _layer_step(device: torch.device, length: int, ranks: int, group: dist.ProcessGroup) -> Callable[[], None]:
    """A whole lightning attention layer: projections, attention, norm, gate."""
    config, cut = ModelConfig.preset(LAYER[device.type]), Cut(_borders(length), ranks, balanced=ranks > 1)
    with torch.device(device):
        layer = LightningAttention(config, MIDDLE[device.type])
        layer.init_weights(1.0)
        layer.norm.weight.data.fill_(1.0)
    layer = layer.to(device)
    x = random(device, 1, cut.length(dist.get_rank()), config.hidden_size)

    def step() -> None:
        context = SliceContext(config, cut, group)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out: Tensor = layer(x, cache=context.layers[0])
        both(out)

    return step


def _ring_step(device: torch.device, length: int, ranks: int, group: dist.ProcessGroup) -> Callable[[], None]:
    config, cut = ModelConfig.preset(LAYER[device.type]), Cut(_borders(length), ranks, balanced=ranks > 1)
    heads, tokens = (config.num_heads, config.num_kv_heads, config.num_kv_heads), cut.length(dist.get_rank())
    q, k, v = (random(device, 1, tokens, number, config.head_dim) for number in heads)
    return lambda: both(ring_attention(q, k, v, cut, group))
