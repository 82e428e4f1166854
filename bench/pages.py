"""The tables of README and of pages in docs, as bench/results has them.

    python bench/pages.py                 writes the pages anew; nothing is measured
    fulmen bench NAME --json FILE         measures; FILE goes to bench/results

A table stands between `<!-- bench/pages.py NAME -->` and `<!-- end -->`, NAME a function of this file.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("gpu", "parallel", "serve", "vision")))
SECTION = re.compile(r"(<!-- bench/pages\.py (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """`text` with every table of this file as the results have it."""
    return SECTION.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine() -> str:
    """What the figures were measured on; one line."""
    at = read("model")["machine"]
    packages = ", ".join(
        f"{name} {at[name]}" for name in ("torch", "triton", "transformers", "fla-core", "lightning-attn")
    )
    return f"One {at['gpu']}; {packages}."


def peers() -> str:
    """Attention beside the peers, 64 heads of 128, bf16."""
    rows = []
    for row in read("lightning")["peers"]:
        pairs = [
            f"{row[f'{who} forward']:.2f} / {row[f'{who} training']:.2f}" if f"{who} forward" in row else "-"
            for who in ("ours", "floor", "fla", "lightning2", "softmax")
        ]
        rows.append([row["shape"], *pairs, f"{row['fla / ours forward']:.2f} / {row['fla / ours training']:.2f}"])
    return markdown(["samples x tokens", "ours", "floor", "fla", "lightning-2", "softmax, cuDNN", "fla / ours"], rows)


def flatness() -> str:
    """Million tokens a second of the kernel, forward, against the length."""
    rows = read("lightning")["flatness"]
    lengths = [key for key in rows[0] if key.isdigit()]
    cells = [
        [f"{row['heads']}", *(f"{row[n] / 1e6:.1f}" if isinstance(row.get(n), float) else "-" for n in lengths)]
        for row in rows
    ]
    return markdown(["heads", *(f"{int(n) // 1024}K" for n in lengths)], cells)


def model() -> str:
    """Prefill and decoding of the 950 M model beside transformers with the same weights."""
    results = read("model")
    rows = [
        [
            f"prefill {row['prompt']}, tokens/s",
            f"{row['ours']:,.0f}",
            f"{row['transformers']:,.0f}",
            f"{row['ratio']:.1f}",
        ]
        for row in results["prefill"]
    ]
    rows += [
        [
            f"decoding, batch {row['batch']}, ms a step",
            f"{row['ours']:.2f} ({row['share of the copy rate']:.0%} of the bytes' limit)",
            f"{row['transformers']:.1f}",
            f"{row['ratio']:.0f}",
        ]
        for row in results["decoding"]
    ]
    return markdown(["", "fulmen", "transformers", "ratio"], rows)


def training() -> str:
    """Training of the 950 M model by the length of its samples."""
    rows: dict[int, dict[str, dict]] = {}
    for row in read("train")["lengths"]:
        rows.setdefault(row["length"], {})[row["layers"]] = row
    cells = []
    for length, by in rows.items():
        speeds = [
            f"{by[who]['tokens a second'] / 1e3:.0f}" if who in by else "-"
            for who in ("softmax", "hybrid", "lightning")
        ]
        ratio = by["hybrid"].get("hybrid / softmax")
        share = f"{by['hybrid']['share of the matrix rate']:.0%}"
        cells.append([f"{length // 1024}K", *speeds, "-" if ratio is None else f"{ratio:.2f}", share])
    head = ["tokens of a sample", "softmax", "hybrid", "lightning", "hybrid / softmax", "matrix rate reached, hybrid"]
    return markdown(head, cells)


def memory() -> str:
    """Memory and speed of training with long samples beside transformers."""
    rows = [
        [
            row["model"].replace("ours", "fulmen"),
            f"{row['length'] // 1024}K",
            f"{row['peak GB']:.1f}" if "peak GB" in row else "out of memory",
            f"{row['tokens a second']:,.0f}" if "peak GB" in row else "-",
        ]
        for row in read("train")["memory"]
    ]
    return markdown(["model", "tokens of a sample", "peak, GB", "tokens/s"], rows)


def decode() -> str:
    """The next token's kernel, in a CUDA graph."""
    rows = [
        [f"{row['batch']}", f"{row['ours']:.4f}", f"{row['share of the copy rate']:.0%}", f"{row['fla']:.4f}"]
        for row in read("decode")["kernel"]
        if row["share of the copy rate"] <= 1  # more: the states fit in the L2 cache, and the copy rate is no limit
    ]
    return markdown(["sequences", "ours, ms", "share of the copy rate", "fla, ms"], rows)


def experts() -> str:
    """What routing, sorting and permuting cost on top of the products."""
    rows = [
        [
            f"{row['tokens']}",
            *(f"{row[key]:.1%}" for key in ("on top", "on top training", "on top with activation")),
            f"{row['TFLOP/s of the products']:.0f}",
        ]
        for row in read("experts")["layer"]
    ]
    return markdown(["tokens", "forward", "with backward", "forward, with SwiGLU", "TFLOP/s of the products"], rows)


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


def vision_machine() -> str:
    """What `make vision` ran on, and how long its stages took; one line."""
    results = read("vision")
    at = results["machine"]
    minutes = sum(stage["seconds"] for stage in results["stages"]) / 60
    return f"One {at['gpu']}, torch {at['torch']}; {minutes:.0f} minutes of training."


def vision_encoder() -> str:
    """What the encoder has learnt, beside chance and an encoder at random."""
    rows = [
        [
            row["pictures"],
            f"{row['classes']}",
            *(
                f"{row[key]:.0%} / {row[f'{key}, random encoder']:.0%} / {row[chance]:.0%}"
                for key, chance in (
                    ("zero-shot top-1", "chance"),
                    ("image to text recall@5", "chance at 5"),
                    ("text to image recall@5", "chance at 5"),
                )
            ),
        ]
        for row in read("vision")["encoder"]
    ]
    return markdown(
        ["pictures", "classes", "zero-shot top-1", "image to text recall@5", "text to image recall@5"], rows
    )


def vision_stages() -> str:
    """Right answers after each stage; bits per byte of held-out text."""
    rows = []
    for stage in read("vision")["stages"]:
        if "bits per byte" in stage:
            answers = [
                f"{row['held out']:.0%} / {row['known']:.0%} / {row['noise']:.0%}" for row in stage.get("answers", [])
            ] or ["-"] * 4
            rows.append([stage["stage"], *answers, f"{stage['bits per byte']:.3f}", f"{stage['seconds']:.0f}"])
    return markdown(["after", "emoji", "digits", "words", "charts", "bits per byte of text", "seconds"], rows)


def vision_answers() -> str:
    """Right answers at the end, on held-out pictures and on noise in their place."""
    rows = [
        [row["pictures"], f"{row['held out']:.0%}", f"{row['known']:.0%}", f"{row['noise']:.0%}"]
        for row in read("vision")["stages"][-1]["answers"]
    ]
    return markdown(["asked about", "held-out pictures", "known pictures, drawn anew", "noise"], rows)


def plan_training() -> str:
    """The best mesh for each length and number of H800s; where none fits, what one would need."""
    rows: list[list[str]] = []
    for row in read("plan")["training"]:
        if row["fits"]:
            rows.append([row["context"], f"{row['GPUs']}", *plan_mesh(row), *plan_speed(row)])
            continue
        if rows and rows[-1][0] == row["context"]:
            rows.pop()  # only the largest that does not do
        least = f"does not fit: {row['GB a GPU']:.0f} GB, most of it {row['largest part']}"
        rows.append([row["context"], f"{row['GPUs']} or fewer", least, *[""] * 9])
    head = ["tokens of a sample", "GPUs", "mesh", "of experts", "rows", "computed again", "GB", "most of it"]
    return markdown([*head, "tokens/s", "MFU", "hidden", "lost most"], rows)


def plan_mesh(row: dict) -> list[str]:
    """Axes of more than one rank, and how the row's plan uses the memory."""
    mesh = row["mesh"]
    axes = [" x ".join(f"{name} {mesh[name]}" for name in names if mesh[name] > 1) for names in PLAN_AXES]
    rows = f"{row['rows of a replica']}" + (f" of {row['samples of a row']}" if row["samples of a row"] > 1 else "")
    return [*axes, rows, "yes" if row["layers computed again"] else "no", f"{row['GB a GPU']:.0f}", row["largest part"]]


def plan_speed(row: dict) -> list[str]:
    """Tokens a second, share of the peak rate, of the talking that is hidden, and what is lost most."""
    shares = [f"{row['MFU']:.0%}", f"{row['hidden']:.0%}", f"{row['lost most']}, {row['lost']:.0%}"]
    return [f"{row['tokens a second']:,.0f}", *shares]


PLAN_AXES = (("pp", "dp", "cp", "tp"), ("pp", "edp", "etp", "ep"))


def plan_batches() -> str:
    """2048 H800s with smaller batches."""
    rows = [[f"{row['batch'] // 2**20}M", *plan_mesh(row)[:3], *plan_speed(row)] for row in read("plan")["batches"]]
    return markdown(["tokens of a step", "mesh", "of experts", "rows", "tokens/s", "MFU", "hidden", "lost most"], rows)


def plan_machines() -> str:
    """What machines are taken to be, and what 1024 of them do."""
    lines: dict[str, list[str]] = {}
    for row in read("plan")["machines"]:
        figures = [row[key] / 1e9 for key in ("memory", "bandwidth", "link", "network")]
        rates = [row[key] / 1e12 for key in ("bf16", "int8")]
        numbers = [f"{figures[0]:.0f}", *(f"{rate:,.0f}" for rate in rates), *(f"{rate:,.0f}" for rate in figures[1:])]
        line = lines.setdefault(row["machine"], [row["machine"], *numbers, row["source"]])
        line.insert(-1, f"{row['tokens a second'] / 1e3:,.0f}, {row['MFU']:.0%}" if row["fits"] else "does not fit")
    head = ["", "memory, GB", "bf16", "int8", "bandwidth", "link", "network", "8K", "128K", "1M", "source"]
    return markdown(head, list(lines.values()))


def plan_serving() -> str:
    """A million tokens on eight GPUs, weights in int8."""
    rows = [
        [
            f"8 x {row['machine']}",
            *(f"{row[key]:.1f}" for key in ("weights, GB a GPU", "keys and values, GB a GPU")),
            *(f"{row[key]}" for key in ("sequences", "tokens in all")),
            f"{row['prompt, s']:.0f}",
            f"{row['next token, ms']:.1f}",
        ]
        for row in read("plan")["serving"]
    ]
    head = ["", "weights, GB a GPU", "keys and values, GB a GPU", "sequences at a time", "tokens in all of them"]
    return markdown([*head, "prompt of 1M, s", "next token after 1M, ms"], rows)


def plan_measured() -> str:
    """The planner beside what `fulmen bench train` measured."""
    rows = [
        [
            f"{row['length'] // 1024}K",
            *(f"{row[key] / 1e3:.0f}" for key in ("tokens a second", "planned")),
            f"{row['planned'] / row['tokens a second'] - 1:+.0%}",
            *(f"{row[key]:.1f}" for key in ("GB", "planned GB")),
            f"{row['planned GB'] / row['GB'] - 1:+.0%}",
        ]
        for row in read("plan")["measured"]
    ]
    head = ["tokens of a sample", "thousand tokens/s, measured", "planned", "", "GB, measured", "planned", ""]
    return markdown(head, rows)


GPU = (machine, peers, flatness, model, training, memory, decode, experts)
VISION = (vision_machine, vision_encoder, vision_stages, vision_answers)
SERVING = (serving_machines, clients_cpu, clients_gpu, prefix, engine, int8, load)


def slow_lasp() -> str:
    rows = [
        [f"{row['ranks']}", *(f"{row[name]['ms']:.1f}" for name in ("LASP+", "serial"))]
        for row in read("parallel-slow")["lasp"]
    ]
    return markdown(["ranks", "LASP+, ms", "serial LASP, ms"], rows)


def slow_ring() -> str:
    rows = [
        [row["cut"], "yes" if row["overlap"] else "no", f"{row['ms']:.0f}", percent(row["hidden"])]
        for row in read("parallel-slow")["ring"]
    ]
    return markdown(["cut", "overlap", "ms", "hidden"], rows)


def slow_experts() -> str:
    rows = [
        [f"{row['groups']}", f"{row['ms']:.0f}", f"{row['travelling, ms']:.0f}", percent(max(0.0, row["hidden"]))]
        for row in read("parallel-slow")["experts"]
    ]
    return markdown(["groups of tokens", "ms", "of which something travels", "hidden"], rows)


def global_router() -> str:
    rows = [
        [f"{row['skew']:g}", f"{row['seed']}", percent(row["each rank's own"]), percent(row["global"])]
        for row in sorted(read("parallel-slow")["global router"], key=lambda row: row["skew"])
    ]
    return markdown(["skew", "seed", "dropped, each rank's own capacity", "dropped, global router"], rows)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


MANY_RANKS = (slow_lasp, slow_ring, slow_experts, global_router)
PLANNING = (plan_training, plan_batches, plan_machines, plan_serving, plan_measured)
TABLES = {table.__name__: table for table in (*GPU, *SERVING, *VISION, *PLANNING, *MANY_RANKS)}


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
