"""Teams of agents: worlds alone, worlds and learning together, and memory, beside their peers.

    python bench/marl.py                                    all tables; results in bench/results/marl.json
    python bench/marl.py --only learning --peers PYTHON      one of worlds, learning, memory
    python bench/marl.py --device cuda                      ours on a GPU; the peers stay on the CPU

PYTHON is the interpreter of an environment that has benchmarl and vmas installed (VMAS is under the GPL, so it is no
dependency of ours); without it their columns are empty. Peers and we take turns, and ratios are of one turn, the median
of all turns.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fulmen.marl.learner import LearnerSettings, MemorySettings, TeamLearner
from fulmen.marl.replay import Batch
from fulmen.marl.spec import TeamSpec
from fulmen.marl.team import Team, TeamSettings
from fulmen.marl.transfer.base import Transfer
from fulmen.marl.worlds import make_environment
from fulmen.run.machine import describe_machine
from fulmen.run.memory import keep_freed_memory
from record import write_results

AGENTS = 3
WORLDS = (1, 32, 256, 1024, 4096)
MANY_WORLDS = (16_384, 65_536)  # only for a GPU
# BenchMARL's cycle: so many frames from so many worlds, then so many updates of so many frames each.
CYCLE = {"worlds": 64, "frames": 6400, "updates": 100, "batch": 256}
ITERATIONS = 6  # cycles of one turn
EPISODE, OBSERVATION = 1000, 7
BATCHES = (1, 2, 4, 8, 16)  # episodes of an update
PEERS = Path(__file__).parent / "peers"
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("worlds", "learning", "memory"), help="one table instead of all")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has benchmarl and vmas")
    parser.add_argument("--device", default="cpu", help="of ours (default: cpu)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each comparison (default: 5)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    keep_freed_memory()  # as every run does
    machine = describe_machine(*(["mpe2"] if device.type == "cpu" else []), device=device)
    machine |= {"threads": torch.get_num_threads()}
    machine |= peer_versions(arguments.peers) if arguments.peers else {}
    CONSOLE.print(" ".join(f"{key}={value}" for key, value in machine.items()), highlight=False)
    tables = {"worlds": bench_worlds, "learning": bench_learning, "memory": bench_memory}
    chosen = [arguments.only] if arguments.only else list(tables)
    results = {name: tables[name](arguments.peers, arguments.turns, device) for name in chosen}
    if not arguments.only:
        name = "marl" if device.type == "cpu" else f"marl-{device.type}"
        CONSOLE.print(f"written to {write_results(name, machine, results)}")


def bench_worlds(peers: str | None, turns: int, device: torch.device) -> dict:
    """World steps a second under random actions, spread with 3 agents."""
    table = Table("worlds", "ours", "VMAS", "ratio", "mpe2 (one world)", title="world steps a second, spread, 3 agents")
    results = {}
    for worlds in WORLDS if device.type == "cpu" else WORLDS + MANY_WORLDS:
        rates, one = [], worlds == 1 and device.type == "cpu"
        for _ in range(turns):
            theirs = peer(peers, "vmas_spread.py", worlds, torch.get_num_threads()) if peers else None
            rates.append((world_rate(worlds, device), theirs, mpe2_rate() if one else None))
        row = summary([ours for ours, _, _ in rates], [theirs for _, theirs, _ in rates])
        if one:
            row["mpe2"] = statistics.median(rate for _, _, rate in rates)
        results[str(worlds)] = row
        cells = (row["ours"], row.get("peer"), row.get("ratio"), row.get("mpe2"))
        table.add_row(f"{worlds}", *(number(cell) for cell in cells))
    CONSOLE.print(table)
    return results


def bench_learning(peers: str | None, turns: int, device: torch.device) -> dict:
    """Frames a second of independent DDPG with its worlds: equal networks, batches, worlds and updates per frame."""
    ours, theirs = [], []
    for _ in range(turns):
        arguments = (*CYCLE.values(), ITERATIONS, torch.get_num_threads())
        theirs.append(peer(peers, "benchmarl_iddpg.py", *arguments) if peers else None)
        ours.append(learning_speed(device))
    row = summary(ours, theirs)
    table = Table("ours", "BenchMARL IDDPG on VMAS", "ratio", title="frames a second, worlds and learning together")
    table.add_row(*(number(row.get(key)) for key in ("ours", "peer", "ratio")))
    CONSOLE.print(table)
    return row


def bench_memory(peers: str | None, turns: int, device: torch.device) -> dict:
    """Steps a second of learning from episodes of 1000 steps: lightning memory beside LSTM."""
    table = Table(
        "episodes a batch", "lightning", "LSTM", "ratio", title=f"steps learned from a second, episodes of {EPISODE}"
    )
    results, kinds = {}, ("lightning", "lstm")
    for episodes in BATCHES:
        rates = {kind: [] for kind in kinds}
        updates = {kind: memory_update(kind, episodes, device) for kind in rates}
        for _ in range(turns):
            for kind, update in updates.items():
                rates[kind].append(episodes * EPISODE / seconds(update, device))
        row = results[str(episodes)] = summary(*rates.values(), names=kinds)
        table.add_row(f"{episodes}", *(number(row[key]) for key in (*kinds, "ratio")))
    CONSOLE.print(table)
    return results


def world_rate(worlds: int, device: torch.device) -> float:
    environment = make_environment("spread", num_worlds=worlds, agents=AGENTS, device=device)
    environment.reset(0)
    actions = torch.rand(8, worlds, AGENTS, environment.spec.action_size, device=device)
    steps = max(20, 20_000 // worlds)

    def run() -> None:
        for step in range(steps):
            environment.step(actions[step % 8])

    return steps * worlds / seconds(run, device)


def mpe2_rate(steps: int = 1000) -> float:
    from mpe2 import simple_spread_v3

    environment = simple_spread_v3.parallel_env(N=AGENTS, continuous_actions=True)
    environment.reset(seed=0)
    spaces = {agent: environment.action_space(agent) for agent in environment.agents}

    def run() -> None:
        for _ in range(steps):
            environment.step({agent: space.sample() for agent, space in spaces.items()})
            if not environment.agents:
                environment.reset()

    return steps / seconds(run, torch.device("cpu"))


def learning_speed(device: torch.device) -> float:
    """Frames a second: the median cycle of those after the first, as the peer's script has it."""
    environment = make_environment("spread", num_worlds=CYCLE["worlds"], agents=AGENTS, max_steps=100, device=device)
    learner = TeamLearner(environment.spec, LearnerSettings(batch=CYCLE["batch"], hidden=(64, 64)), device=device)
    every = CYCLE["frames"] // CYCLE["worlds"] // CYCLE["updates"]
    settings = TeamSettings(warmup=0, update_every=every, updates=1, capacity=100_000)
    team = Team(environment, learner, Transfer(learner), settings, seed=0)

    def run() -> None:
        for _ in range(CYCLE["frames"] // CYCLE["worlds"]):
            team.step()

    return CYCLE["frames"] / statistics.median(seconds(run, device) for _ in range(ITERATIONS // 2))


def memory_update(kind: str, episodes: int, device: torch.device) -> Callable[[], None]:
    low = -torch.ones(AGENTS, 2)
    names = tuple(f"agent {i}" for i in range(AGENTS))
    sizes = {"observation_sizes": (OBSERVATION,) * AGENTS, "action_sizes": (2,) * AGENTS}
    spec = TeamSpec(agents=names, low=low, high=-low, **sizes)
    learner = TeamLearner(spec, LearnerSettings(memory=MemorySettings(kind=kind)), device=device)
    shape = (episodes, EPISODE, AGENTS)
    never = torch.zeros(shape, dtype=torch.bool, device=device)
    batch = Batch(
        torch.randn(episodes, EPISODE + 1, AGENTS, OBSERVATION, device=device),
        torch.rand(*shape, 2, device=device) * 2 - 1,
        torch.randn(shape, device=device),
        never,
        never,
        ~never,
        None,
    )
    return lambda: learner.update(batch)


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """The second of two calls, with all that they set going on a GPU."""
    call()
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(
    ours: list[float], theirs: list[float | None], names: tuple[str, str] = ("ours", "peer")
) -> dict[str, float]:
    """The median of each by its name, and of what ours are to theirs, turn by turn, as the ratio."""
    row = {names[0]: statistics.median(ours)}
    if None not in theirs:
        row[names[1]] = statistics.median(theirs)
        row["ratio"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return row


def peer(python: str, script: str, *arguments: int) -> float:
    """The median rate that a peer's script prints."""
    command = [python, str(PEERS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return statistics.median(json.loads(done.stdout.strip().splitlines()[-1])["rates"])


def peer_versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('benchmarl', 'vmas')}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main()
