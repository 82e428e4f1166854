"""What parallel training costs and hides: LASP+ beside serial LASP, the ring, experts in groups of tokens.

    python bench/parallel.py --hosts 4 --rate 400mbit --json bench/results/parallel-slow.json   hosts with slow links
    torchrun --nproc-per-node 8 bench/parallel.py --json results.json                           GPUs, under NCCL
    python bench/parallel.py --draw bench/results/parallel-slow.json                            pictures of that

With --hosts it makes hosts of network namespaces on this machine (bench/hosts.py; root, Linux), a rank on each.
Times are of the slowest rank, forward and backward where not said otherwise. Hidden: the part of the time in which
something travelled that ranks did not wait for (bench/timeline.py; gloo's collectives alone).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fulmen.ops.experts import route
from fulmen.ops.lightning import decay_rates
from fulmen.parallel import Cut
from fulmen.parallel.capacity import drop_rates
from fulmen.parallel.experts import spread_experts_mlp
from fulmen.parallel.lasp import lasp_attention, serial_lasp_attention
from fulmen.parallel.ring import ring_attention
from fulmen.run import plot_curves
from fulmen.run.machine import describe_machine
from hosts import hosts
from timeline import Timeline

PORT, PATIENCE = "29517", 600
SIZES = {
    "cpu": dict(tokens=1024, heads=4, width=64, hidden=256, expert_width=512, experts=8, repeats=5),
    "cuda": dict(tokens=65536, heads=32, width=128, hidden=4096, expert_width=4096, experts=32, repeats=10),
}
GROUPS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, help="make so many hosts on this machine, and run on each")
    parser.add_argument("--rate", default="400mbit", help="of each host's link, as tc writes it (default: 400mbit)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers there")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="results to draw into docs/images; measures nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.draw.read_text()), arguments.draw.stem)
        return
    if arguments.hosts is None:
        measure(arguments)
        return
    command = [sys.executable, __file__, "--rate", arguments.rate]
    command += ["--json", str(arguments.json)] if arguments.json else []
    with hosts(arguments.hosts, rate=arguments.rate) as run:
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    results = {"link": arguments.rate, "lasp": lasp(device), "ring": ring(device), "experts": experts(device)}
    results["global router"] = router()
    if dist.get_rank() == 0:
        print(json.dumps(results, indent=2), flush=True)
        if arguments.json:
            machine = describe_machine(device=device)
            arguments.json.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def lasp(device: torch.device) -> list[dict]:
    """One sample over 1, 2, ... ranks, each with as many tokens; forward, since serial LASP has no backward here."""
    sizes, rows = SIZES[device.type], []
    for ranks in _powers(dist.get_world_size()):
        group = dist.new_group(list(range(ranks)))
        if dist.get_rank() < ranks:
            cut = Cut((0, sizes["tokens"] * ranks), ranks)
            qkv = _random(device, 1, sizes["tokens"], sizes["heads"], 3, sizes["width"])
            rates = decay_rates(sizes["heads"], 0, 8).to(device)
            row = {"ranks": ranks}
            for name, attention in (("LASP+", lasp_attention), ("serial", serial_lasp_attention)):
                step = torch.no_grad()(lambda f=attention, a=(qkv, rates, cut, group): f(*a))
                row[name] = timed(step, group, device)
            rows.append(row)
        dist.barrier()
    return rows


def ring(device: torch.device) -> list[dict]:
    """One sample over all ranks, keys travelling under the computation or before it, plain and balanced cut."""
    sizes, ranks, rows = SIZES[device.type], dist.get_world_size(), []
    for balanced, overlap in ((False, False), (False, True), (True, True)):
        cut = Cut((0, sizes["tokens"] * ranks), ranks, balanced)
        q, k, v = (_random(device, 1, sizes["tokens"], sizes["heads"], sizes["width"]) for _ in range(3))
        how = dict(overlap=overlap)
        row = timed(lambda a=(q, k, v, cut, dist.group.WORLD), h=how: _both(ring_attention(*a, **h)), None, device)
        rows.append({"cut": "balanced" if balanced else "plain", "overlap": overlap} | row)
    # By the times of the same cut: without overlap all that travels is waited for.
    rows[1]["hidden"] = (rows[0]["ms"] - rows[1]["ms"]) / rows[0]["travelling, ms"]
    rows[0]["hidden"], rows[2]["hidden"] = 0.0, None
    return rows


def experts(device: torch.device) -> list[dict]:
    """All ranks along ep, tokens in 1, 2, 4, 8 groups."""
    sizes, ranks, rows = SIZES[device.type], dist.get_world_size(), []
    here, single = sizes["experts"] // ranks, dist.new_subgroups(1)[0]
    x = _random(device, sizes["tokens"], sizes["hidden"])
    w13 = _random(device, here, 2 * sizes["expert_width"], sizes["hidden"])
    w2 = _random(device, here, sizes["hidden"], sizes["expert_width"])
    routing = route(torch.randn(sizes["tokens"], sizes["experts"], device=device), 2)
    for groups in GROUPS:
        how = dict(ep=dist.group.WORLD, etp=single, groups=groups)
        row = timed(lambda h=how: _both(spread_experts_mlp(x, w13, w2, routing, **h)), None, device)
        rows.append({"groups": groups} | row)
    return rows


def router() -> list[dict]:
    """Choices dropped with a capacity of 1.0 on routing that each rank skews its own way, with and without sharing."""
    rows = []
    for seed in range(3):
        torch.manual_seed(seed)
        for skew in (0.0, 1.0, 2.0):
            logits = [torch.randn(1024, 16) + skew * torch.randn(16) for _ in range(8)]
            own, shared = drop_rates(logits, 2, 1.0)
            rows.append({"seed": seed, "skew": skew, "each rank's own": own, "global": shared})
    return rows


def draw(results: dict, name: str) -> None:
    """A picture of the experts' times by groups, and one of lightning attention's by ranks."""
    images = Path(__file__).parents[1] / "docs" / "images"
    groups, ranks = ([row[key] for row in results[part]] for part, key in (("experts", "groups"), ("lasp", "ranks")))
    travelling = [row["travelling, ms"] for row in results["experts"]]
    waited = [(1 - max(0, row["hidden"])) * row["travelling, ms"] for row in results["experts"]]
    series = {"step": [row["ms"] for row in results["experts"]], "something travels": travelling, "waited for": waited}
    curves = {label: (groups, values) for label, values in series.items()}
    title = f"experts over {results['link']} links"
    plot_curves(images / f"{name}-experts.png", curves, title=title, x_label="groups of tokens", y_label="ms")
    curves = {label: (ranks, [row[label]["ms"] for row in results["lasp"]]) for label in ("LASP+", "serial")}
    title = f"lightning attention of one sample over {results['link']} links"
    plot_curves(images / f"{name}-lasp.png", curves, title=title, x_label="ranks", y_label="ms")


def timed(step: Callable[[], object], group: dist.ProcessGroup | None, device: torch.device) -> dict:
    """Median of several steps: ms of the slowest rank; and the mean rank's share of travelling that was hidden."""
    step()
    found = []
    for _ in range(SIZES[device.type]["repeats"]):
        dist.barrier(group)
        _finish(device)
        started = time.perf_counter()
        with Timeline() as timeline:
            step()
            _finish(device)
        found.append((time.perf_counter() - started, timeline.travelling, timeline.waiting))
    seconds, travelling, waiting = (statistics.median(each) for each in zip(*found, strict=True))
    slowest, sums = torch.tensor(seconds), torch.tensor([travelling, waiting])
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    dist.all_reduce(sums, group=group)
    hidden = 1 - (sums[1] / sums[0]).item() if device.type == "cpu" and sums[0] > 0 else None
    return {"ms": 1e3 * slowest.item(), "travelling, ms": 1e3 * travelling, "hidden": hidden}


def _both(out: torch.Tensor) -> None:
    out.backward(torch.ones_like(out))


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return (torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.25).requires_grad_()


def _powers(most: int) -> list[int]:
    return [ranks for ranks in (1, 2, 4, 8) if ranks <= most]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
