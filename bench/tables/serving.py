"""Serving beside its peers (docs/serve.md)."""

from tables.results import markdown, read, short


def serving_machines() -> str:
    """What `fulmen bench serve` ran on; one line."""
    cpu, gpu = read("serve")["machine"], read("serve-gpu")["machine"]
    return (
        f"CPU: {cpu['cores']} cores of an {cpu['cpu'].split(' avx')[0]}, the quickstart model, float32, "
        f"torch {cpu['torch'].split('+')[0]}, transformers {cpu['transformers']}. GPU: one {gpu['gpu']}, the 950 M "
        f"model, bfloat16, torch {gpu['torch']}, transformers {gpu['transformers']}."
    )


def clients(name: str) -> str:
    """Tokens a second and waiting times of an engine, beside transformers' continuous batching."""
    rows = []
    for row in read(name)["load"]:
        waits = [
            f"{short(row[f'{who}{what} p50'])} / {short(row[f'{who}{what} p99'])}"
            for what in ("first token", "next token")
            for who in ("", "transformers ")
        ]
        speeds = [f"{row['tokens/s']:,.0f}", f"{row['transformers tokens/s']:,.0f}", f"{row['ratio']:.1f}"]
        rows.append([f"{row['clients']}", *speeds, *waits])
    head = ["clients", "tokens/s", "transformers", "ratio", "first token, ms", "transformers", "next token, ms"]
    return markdown([*head, "transformers"], rows)


def clients_cpu() -> str:
    return clients("serve")


def clients_gpu() -> str:
    return clients("serve-gpu")


def prefix() -> str:
    """32 requests with one system prompt of 2000 tokens, without and with the prefix cache."""
    rows = [
        [
            where,
            row["prefix cache"],
            *(f"{row[f'first token {part}']:,.0f}" for part in ("p50", "p99")),
            f"{row['tokens/s']:,.0f}",
            f"{row['hit rate']:.1%}",
        ]
        for where, name in (("CPU", "serve"), ("GPU", "serve-gpu"))
        for row in read(name)["prefix"]
    ]
    return markdown(["", "prefix cache", "first token p50, ms", "p99, ms", "tokens/s", "hit rate"], rows)


def engine() -> str:
    """Steps of the engine alone."""
    rows = []
    for name in ("serve", "serve-gpu"):
        for row in read(name)["engine"]:
            prompt, speed = next((key, row[key]) for key in row if key.startswith("prompt of"))
            weights = f"{row['weights, GB']:.3g}" if "weights, GB" in row else ""
            times = [f"{row[f'step of {batch}, ms']:.3g}" for batch in (1, 32)]
            tokens = prompt.removeprefix("prompt of ").removesuffix(", tokens/s")
            rows.append(["GPU" if "gpu" in name else "CPU", row["model"], weights, *times, f"{speed:,.0f} ({tokens})"])
    head = ["", "model", "weights, GB", "a step of 1, ms", "of 32, ms", "prompt, tokens/s (its tokens)"]
    return markdown(head, rows)


def int8() -> str:
    """Weights of the quickstart model in three types."""
    rows = [
        [row["dtype"], f"{row['MB']:.1f}", f"{row['bits per byte']:.4f}"]
        + [f"{row[key]:.3g}" for key in ("decoding 1, ms", "decoding 16, ms", "prompt of 512, ms")]
        for row in read("int8")["int8"]
    ]
    return markdown(["weights", "MB", "bits per byte", "a step of 1, ms", "of 16, ms", "prompt of 512, ms"], rows)


def load() -> str:
    """What `python bench/load.py` saw."""
    results = read("load")
    asked, resident, stop = results["requests"], results["resident memory"], results["SIGTERM"]
    wrong = sum(asked[name] for name in ("incomplete", "broken off", "failed", "hung"))
    rows = [
        ["clients, seconds", f"{results['clients']}, {results['seconds']:.0f}"],
        ["answers finished", f"{asked['finished']}"],
        ["left by their client in the midst", f"{asked['left']}"],
        ["refused with 429, the queue being full", f"{asked['refused']}"],
        ["incomplete, failed or hung", f"{wrong}"],
        ["pages, slots and requests held at the end", f"{sum(results['held at the end'].values()):.0f}"],
        ["resident memory, half-way and at the end", f"{resident['half MB']:.0f} and {resident['end MB']:.0f} MB"],
        ["streams at SIGTERM that ended whole", f"{stop['finished']} of {sum(list(stop.values())[:3])}"],
    ]
    return markdown(["", ""], rows)


TABLES = (serving_machines, clients_cpu, clients_gpu, prefix, engine, int8, load)
