"""The engine under load beside transformers' `generate` with the same weights, and what the prefix cache saves.

On a CPU the model is that of the quickstart in fp32, on a GPU the 950 M one of `fulmen bench model` in bf16. Clients
ask in a loop: each sends its next prompt when it has its answer. transformers has no queue; it is given as many prompts
as there are clients as one batch, at once. Times are what clients see, in milliseconds.
"""

import asyncio
import copy
import functools
import itertools
import random
import re
import statistics
import string
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from fulmen.bench import cpu
from fulmen.bench.gpu import quotient, show
from fulmen.data import Tokenizer
from fulmen.model import LanguageModel, ModelConfig
from fulmen.model.int8 import quantize_
from fulmen.serve import Engine, EngineSettings, SamplingParams
from fulmen.serve.service import Service

CONCURRENCY = (1, 4, 16, 64)
PROMPT, ANSWER = 128, 64
SHARED, OWN, ASKING = 2000, 20, 32
LONG_PROMPT = {"cpu": 2048, "cuda": 16384}
SEQUENCES = (1, 32)


def bench_load() -> list[dict]:
    """Throughput and latency against the number of clients."""
    ours, theirs = models()
    rows = []
    for clients in CONCURRENCY:
        count = max(2 * clients, 8)
        prompts = random_prompts(count, PROMPT)
        params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        engine = new_engine(ours, max_sequences=clients, prefix_cache=False)
        engine.warm_up()
        line = {"clients": clients} | asyncio.run(measure(engine, prompts, params, clients))
        del engine
        line |= {f"transformers {name}": value for name, value in peer(theirs, prompts, clients).items()}
        line["ratio"] = quotient(line["tokens/s"], line["transformers tokens/s"])
        rows.append(show(line))
    return rows


def bench_prefix() -> list[dict]:
    """Prompts of 2000 common tokens and a few of their own, all at once, with the prefix cache and without."""
    ours, _ = models()
    (shared,), own = random_prompts(1, SHARED), random_prompts(ASKING, OWN)
    prompts = [shared + end for end in own]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    rows = []
    for is_cached in (False, True):
        engine = new_engine(ours, max_sequences=ASKING, prefix_cache=is_cached)
        engine.warm_up()
        line = {"prefix cache": "on" if is_cached else "off"}
        rows.append(show(line | asyncio.run(measure(engine, prompts, params, ASKING))))
        del engine
    return rows


def bench_engine() -> list[dict]:
    """A step of the engine by itself, sampling included, and a long prompt: the weights as they are, and in int8."""
    ours, theirs = models()
    rounded = copy.deepcopy(ours)
    quantize_(rounded)
    dtype = str(ours.embed_tokens.weight.dtype).removeprefix("torch.")
    rows = [engine_row(f"fulmen, {name}", model) for name, model in ((dtype, ours), ("int8", rounded))]
    rows.append(show({"model": f"transformers, {dtype}"} | times_of(functools.partial(their_times, theirs))))
    return rows


def engine_row(name: str, model: LanguageModel) -> dict:
    tensors = (*model.parameters(), *model.buffers())
    size = {"model": name, "weights, GB": sum(tensor.nbytes for tensor in tensors) / 1e9}
    return show(size | times_of(functools.partial(our_times, model)))


def times_of(measure_batch: Callable[[int, int], list[float]]) -> dict[str, float]:
    """Of `measure_batch(sequences, length of their prompts)`, which gives the seconds of a prompt and of each step."""
    found = {}
    for batch in SEQUENCES:
        found[f"step of {batch}, ms"] = statistics.median(measure_batch(batch, PROMPT)[1:]) * 1e3
    length = LONG_PROMPT["cuda" if torch.cuda.is_available() else "cpu"]
    seconds = statistics.median(measure_batch(1, length)[0] for _ in range(3))
    return found | {f"prompt of {length}, tokens/s": length / seconds}


def our_times(model: LanguageModel, batch: int, length: int) -> list[float]:
    prompts = random_prompts(batch, length)
    whole = {"chunk_tokens": 16384} if torch.cuda.is_available() else {}
    engine = new_engine(model, max_sequences=batch, prefix_cache=False, max_context=length + ANSWER, **whole)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    engine.generate(prompts, params)  # kernels and graphs
    for prompt in prompts:
        engine.submit(prompt, params)
    times = [time.perf_counter()]
    while engine.has_work:
        if sum(piece.generated_tokens > 0 for _, piece in engine.step()) == batch:
            times.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@torch.inference_mode()
def their_times(model: torch.nn.Module, batch: int, length: int) -> list[float]:
    tokens = torch.tensor(random_prompts(batch, length), device=model.device)
    model(tokens, use_cache=True, logits_to_keep=1)
    times = [time.perf_counter()]
    for _ in steps_of(model, tokens, ANSWER):
        times.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(times)]


TABLES = {"load": bench_load, "prefix": bench_prefix, "engine": bench_engine}


def models() -> tuple[LanguageModel, torch.nn.Module]:
    """Ours and transformers', whose logits have been compared."""
    if torch.cuda.is_available():
        from fulmen.bench import model

        return model.models()
    ours, theirs = cpu.equal_models(ModelConfig.preset("tiny"))
    return ours.eval(), theirs.eval()


@functools.cache
def tokenizer_of(size: int) -> Tokenizer:
    """Of made-up words, so that almost every token writes something: clients see no token that does not."""
    rng = random.Random(0)
    words = ("".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(2 * size))
    return Tokenizer.train([" ".join(words)], size)


def random_prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(4, 1000, (count, length)).tolist()


def new_engine(model: LanguageModel, *, max_context: int = PROMPT + SHARED + OWN + ANSWER, **settings) -> Engine:
    settings = EngineSettings(max_context=max_context, **settings)
    return Engine(model, tokenizer_of(model.config.vocab_size), settings)


async def measure(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, clients: int) -> dict:
    """Tokens a second, and what clients wait for the first token and between tokens."""
    left, first, between, tokens = list(prompts), [], [], 0

    async def client(service: Service) -> None:
        nonlocal tokens
        while left:
            asked = last = time.perf_counter()
            is_first = True
            async for piece in service.stream(left.pop(), params):
                now = time.perf_counter()
                (first if is_first else between).append(now - (asked if is_first else last))
                is_first, last, tokens = False, now, tokens + len(piece.tokens)

    async with Service(engine) as service:
        started = time.perf_counter()
        await asyncio.gather(*(client(service) for _ in range(clients)))
        seconds = time.perf_counter() - started
        rate = re.search(r"^fulmen_prefix_cache_hit_rate (\S+)", service.metrics.render().decode(), re.MULTILINE)[1]
    assert tokens == len(prompts) * params.max_tokens, "an answer is not whole"
    return {"tokens/s": tokens / seconds} | latencies(first, between) | {"hit rate": float(rate)}


@torch.inference_mode()
def peer(model: torch.nn.Module, prompts: Sequence[list[int]], clients: int) -> dict:
    """The same of transformers: batches of `clients` prompts, one after the other."""
    first, between, tokens, started = [], [], 0, time.perf_counter()
    for begin in range(0, len(prompts), clients):
        batch = torch.tensor(prompts[begin : begin + clients], device=model.device)
        times = [time.perf_counter()]
        for _ in steps_of(model, batch, ANSWER):
            times.append(time.perf_counter())
        first += [times[1] - times[0]] * len(batch)
        between += [later - earlier for earlier, later in itertools.pairwise(times[1:])]
        tokens += len(batch) * ANSWER
    return {"tokens/s": tokens / (time.perf_counter() - started)} | latencies(first, between)


def steps_of(model: torch.nn.Module, prompts: torch.Tensor, count: int) -> Iterator[list]:
    """transformers' greedy tokens, step by step, each when the host has it."""
    out = model(prompts, use_cache=True, logits_to_keep=1)
    for step in range(count):
        token = out.logits[:, -1:].argmax(-1)
        yield token.tolist()
        if step + 1 < count:
            out = model(token, past_key_values=out.past_key_values, use_cache=True)


def latencies(first: list[float], between: list[float]) -> dict[str, float]:
    """Medians and 99th percentiles, milliseconds."""
    found = {}
    for name, times in (("first token", first), ("next token", between)):
        found[f"{name} p50"] = statistics.median(times) * 1e3
        found[f"{name} p99"] = sorted(times)[int(0.99 * (len(times) - 1))] * 1e3
    return found
