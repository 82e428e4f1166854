"""What the planner says (docs/parallel.md)."""

from tables.results import markdown, read


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
        rows.append([row["context"], f"{row['GPUs']} or fewer", least, *[""] * 10])
    head = [
        "tokens of a sample",
        "GPUs",
        "mesh",
        "of experts",
        "rows",
        "computed again",
        "weights kept",
        "GB",
        "most of it",
    ]
    return markdown([*head, "tokens/s", "MFU", "hidden", "lost most"], rows)


def plan_mesh(row: dict) -> list[str]:
    """Axes of more than one rank, and how the row's plan uses the memory."""
    mesh = row["mesh"]
    axes = [" x ".join(f"{name} {mesh[name]}" for name in names if mesh[name] > 1) for names in PLAN_AXES]
    rows = f"{row['rows of a replica']}" + (f" of {row['samples of a row']}" if row["samples of a row"] > 1 else "")
    choices = ("yes" if row[what] else "no" for what in ("layers computed again", "weights kept gathered"))
    return [*axes, rows, *choices, f"{row['GB a GPU']:.0f}", row["largest part"]]


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


TABLES = (plan_training, plan_batches, plan_machines, plan_serving, plan_measured)
