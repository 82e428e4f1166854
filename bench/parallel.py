"""What parallel training costs and hides, and that it computes what one rank does.

    python bench/parallel.py --hosts 4 --rate 400mbit --json bench/results/parallel-slow.json   hosts with slow links
    torchrun --nproc-per-node 2 bench/parallel.py --json bench/results/parallel.json            GPUs, under NCCL
    torchrun --nproc-per-node 4 bench/parallel.py --parts check axes                            CPU ranks
    python bench/parallel.py --draw bench/results/parallel-slow.json                            pictures of that

With --hosts it makes hosts of network namespaces on this machine (bench/ranks/hosts.py; root, Linux), a rank on each.
Times are of the slowest rank, forward and backward where not said otherwise. Hidden: the part of the time in which
something travelled that ranks did not wait for (bench/ranks/timeline.py).
"""

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fulmen.run import plot_curves
from fulmen.run.machine import describe_machine
from ranks.attention import lasp, lengths, ring
from ranks.check import check
from ranks.experts import experts, router
from ranks.hosts import hosts
from ranks.training import axes, fsdp, rows

PORT, PATIENCE, WAIT = "29517", 600, timedelta(minutes=2)
PARTS = {
    "check": check,
    "axes": axes,
    "lasp": lasp,
    "ring": ring,
    "experts": experts,
    "router": lambda device: router(),
    "lengths": lengths,
    "rows": rows,
    "fsdp": fsdp,
}
SAME_RANKS = ("ranks", "link", "gpu", "torch")
SLOW = ("lasp", "ring", "experts", "router")
"""What is measured over slow links."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, help="make so many hosts on this machine, and run on each")
    parser.add_argument("--rate", help="of each host's link, as tc writes it; with --hosts, 400mbit by default")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers there")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="results to draw into docs/images; measures nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.draw.read_text()), arguments.draw.stem)
        return
    if arguments.hosts is None:
        measure(arguments)
        return
    parts, rate = [part for part in arguments.parts if part in SLOW], arguments.rate or "400mbit"
    if not parts:
        parser.error(f"over slow links {', '.join(SLOW)} are measured, not {', '.join(arguments.parts)}")
    command = [sys.executable, __file__, "--rate", rate, "--parts", *parts]
    command += ["--json", str(arguments.json)] if arguments.json else []
    with hosts(arguments.hosts, rate=rate) as run:
        shared = {"WORLD_SIZE": str(arguments.hosts), "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1"}
        ranks = [run(host, command, RANK=str(host), **shared) for host in range(arguments.hosts)]
        try:
            sys.exit(max(rank.wait(PATIENCE) for rank in ranks))
        finally:
            for rank in ranks:
                rank.kill()


def measure(arguments: argparse.Namespace) -> None:
    """On every rank; the first one tells."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    machine = describe_machine(device=device) | {"link": arguments.rate, "ranks": dist.get_world_size()}
    for part in arguments.parts:
        found = PARTS[part](device)
        if dist.get_rank() == 0:
            print(json.dumps({part: found}, indent=2), flush=True)
            if arguments.json:
                keep(arguments.json, machine, part, found)
    dist.destroy_process_group()


def keep(path: Path, machine: dict, part: str, found: list[dict]) -> None:
    """Write what a part found, after each since a later one may fail, beside what the same ranks found before."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    if any(kept.get("machine", {}).get(key) != machine.get(key) for key in SAME_RANKS):
        kept = {}
    runs = kept.get("runs", {}) | {part: {key: machine[key] for key in ("commit", "time")}}
    path.write_text(
        json.dumps(kept | {"machine": machine, "runs": runs, part: found}, indent=2) + "\n", encoding="utf-8"
    )


def draw(results: dict, name: str) -> None:
    """Pictures of times by ranks (LASP+), by tokens (the ring), by groups of tokens (experts), and what is hidden."""
    images, link = Path(__file__).parents[1] / "docs" / "images", results["machine"]["link"]
    rows = results["lasp"]
    curves = {
        label: ([row["ranks"] for row in rows], [row[label]["ms"] for row in rows]) for label in ("LASP+", "serial")
    }
    title = f"lightning attention of one sample over {link} links"
    plot_curves(images / f"{name}-lasp.png", curves, title=title, x_label="ranks", y_label="ms")
    curves = {}
    for row in results["ring"]:
        xs, ys = curves.setdefault(f"{row['cut']} cut{'' if row['overlap'] else ', no overlap'}", ([], []))
        xs.append(row["tokens of a rank"])
        ys.append(row["ms"])
    title = f"ring attention of one sample over {link} links"
    plot_curves(images / f"{name}-ring.png", curves, title=title, x_label="tokens of a rank", y_label="ms")
    for key, scale, label in (("ms", 1, "ms"), ("hidden", 100, "% hidden")):
        curves = {}
        for row in results["experts"]:
            xs, ys = curves.setdefault(row["mesh"], ([], []))
            xs.append(row["groups"])
            ys.append(scale * max(0.0, row[key]))
        path = images / f"{name}-experts{'' if key == 'ms' else '-hidden'}.png"
        title = f"an expert layer over {link} links"
        plot_curves(path, curves, title=title, x_label="groups of tokens", y_label=label)


if __name__ == "__main__":
    main()
