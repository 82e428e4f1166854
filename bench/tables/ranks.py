"""What many ranks cost, over slow links and on GPUs of one host (docs/parallel.md)."""

from tables.results import markdown, percent, read, short


def slow_lasp() -> str:
    return lasp("parallel-slow")


def lasp(name: str) -> str:
    rows = [
        [f"{row['ranks']}", *(f"{row[who]['ms']:.1f}" for who in ("LASP+", "serial"))] for row in read(name)["lasp"]
    ]
    return markdown(["ranks", "LASP+, ms", "serial LASP, ms"], rows)


def slow_ring() -> str:
    return ring("parallel-slow")


def gpu_ranks_ring() -> str:
    return ring("parallel")


def ring(name: str) -> str:
    rows = [
        [
            f"{row['tokens of a rank']}",
            row["cut"],
            "yes" if row["overlap"] else "no",
            f"{row['ms']:.0f}",
            percent(row["hidden"]),
        ]
        for row in read(name)["ring"]
    ]
    return markdown(["tokens of a rank", "cut", "overlap", "ms", "hidden"], rows)


def slow_experts() -> str:
    return experts("parallel-slow", planned=False)


def gpu_ranks_experts() -> str:
    return experts("parallel", planned=True)


def experts(name: str, *, planned: bool) -> str:
    rows = [
        [
            row["mesh"],
            f"{row['groups']}",
            f"{row['ms']:.0f}",
            *([f"{row['planned ms']:.0f}"] if planned else []),
            f"{row['travelling, ms']:.0f}",
            percent(max(0.0, row["hidden"])),
        ]
        for row in read(name)["experts"]
    ]
    head = ["experts over", "groups of tokens", "ms", *(["planned"] if planned else [])]
    return markdown([*head, "of which something travels", "hidden"], rows)


def global_router() -> str:
    rows = [
        [f"{row['skew']:g}", f"{row['seed']}", percent(row["each rank's own"]), percent(row["global"])]
        for row in sorted(read("parallel-slow")["router"], key=lambda row: row["skew"])
    ]
    return markdown(["skew", "seed", "dropped, each rank's own capacity", "dropped, global router"], rows)


def cpu_ranks() -> str:
    return axes("parallel-cpu")


def axes(name: str) -> str:
    """Each axis: how far from one rank, and what a step costs."""
    rows = [
        [
            row["mesh"],
            *(f"{row[key]:.0e}" if key in row else "-" for key in ("losses off by", "weights off by")),
            f"{row['ms']:.0f}",
            f"{row['MB of a rank']:.0f}",
        ]
        for row in read(name)["axes"]
    ]
    return markdown(["mesh", "losses off by", "weights off by", "ms a step", "MB of a rank"], rows)


def gpu_ranks_machine() -> str:
    return machine("parallel")


def machine(name: str) -> str:
    """What many ranks ran on; one line."""
    at = read(name)["machine"]
    return f"{at['ranks']} {at['gpu']} of one host, torch {at['torch']}, NCCL."


def gpu_ranks_axes() -> str:
    return axes("parallel")


def gpu_ranks_check() -> str:
    """The largest relative error of each, over its cuts or groups of tokens."""
    worst: dict[tuple[str, str], list[float]] = {}
    for row in read("parallel")["check"]:
        errors = worst.setdefault((row["what"].split(",")[0], row["dtype"]), [0.0, 0.0])
        errors[:] = map(max, errors, (row["outputs"], row["gradients"]))
    rows = [[what, dtype, *(f"{error:.1e}" for error in errors)] for (what, dtype), errors in worst.items()]
    return markdown(["", "dtype", "outputs", "gradients"], rows)


def gpu_ranks_lengths() -> str:
    return lengths("parallel")


def lengths(name: str) -> str:
    """Milliseconds, measured and planned, and the share of n times one rank's speed."""
    results = read(name)
    counts = [ranks for ranks in (1, 2, 4, 8) if ranks <= results["machine"]["ranks"]]

    def cell(row: dict, ranks: int) -> str:
        if row[f"{ranks} ranks, ms"] is None:
            return "does not fit"
        text = " / ".join(short(row[f"{ranks} ranks, {key}"]) for key in ("ms", "planned ms"))
        share = row.get(f"{ranks} ranks, efficiency")
        return text if share is None else f"{text}, {share:.0%}"

    rows = [
        [row["what"], f"{row['tokens'] // 1024}K", *(cell(row, ranks) for ranks in counts)]
        for row in results["lengths"]
    ]
    return markdown(["", "tokens", *(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in counts)], rows)


def gpu_ranks_lasp() -> str:
    return lasp("parallel")


def gpu_ranks_rows() -> str:
    """1B parameters, where rows are few and long."""
    rows = [
        [row["mesh"], *(f"{row[key]:,.0f}" for key in ("ms", "planned ms")), *_gigabytes(row)]
        for row in read("parallel")["rows"]
    ]
    return markdown(["mesh", "ms a step", "planned", "GB of a rank", "planned"], rows)


def _gigabytes(row: dict) -> list[str]:
    return [f"{row[key] / 1e3:.1f}" for key in ("MB of a rank", "planned MB of a rank")]


def gpu_ranks_training() -> str:
    """7B parameters."""
    rows = [
        [
            row["mesh"],
            f"{row['tokens/s of a GPU']:,.0f}",
            f"{row['share of the matrix rate']:.0%}",
            f"{row['ms']:,.0f}",
            f"{row['planned ms']:,.0f}",
            *_gigabytes(row),
        ]
        for row in read("parallel")["fsdp"]
    ]
    head = ["mesh", "tokens/s of a GPU", "share of the matrix rate", "ms a step", "planned", "GB of a rank", "planned"]
    return markdown(head, rows)


TABLES = (
    slow_lasp,
    slow_ring,
    slow_experts,
    global_router,
    cpu_ranks,
    gpu_ranks_machine,
    gpu_ranks_check,
    gpu_ranks_axes,
    gpu_ranks_lengths,
    gpu_ranks_lasp,
    gpu_ranks_ring,
    gpu_ranks_experts,
    gpu_ranks_training,
    gpu_ranks_rows,
)
