"""What many ranks cost, over slow links and on GPUs of one host (docs/parallel.md)."""

from tables.results import markdown, percent, read


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


TABLES = (slow_lasp, slow_ring, slow_experts, global_router)
