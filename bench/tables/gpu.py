"""What one GPU does (docs/gpu.md)."""

from tables.results import markdown, read


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


TABLES = (machine, peers, flatness, model, training, memory, decode, experts)
