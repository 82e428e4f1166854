"""What teams learn: the comparisons of docs/marl-results.md, each of them one `fulmen marl compare`.

    python bench/teams.py                 all, one after the other: hours on two cores; interrupted, it goes on
    python bench/teams.py sparse memory   these
    python bench/teams.py --page          no training: docs/marl-results.md and README's table, from bench/results

Runs go to runs/marl/NAME-compare, what is kept to bench/results/teams/NAME.json. A comparison that begins from another
one's teams comes after it.
"""

import argparse
import json
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fulmen.marl.export import read_curves
from fulmen.marl.statistics import area_under_curve, bootstrap_interval, compare_paired

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "teams"
PAGE, README = ROOT / "docs" / "marl-results.md", ROOT / "README.md"
MARK, END = "<!-- bench/teams.py -->\n", "<!-- end -->"
WAYS = {"transfer": "acting with transfer", "own": "own policies only"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One command and what it is to show."""

    title: str
    question: str
    command: str  # after `fulmen marl compare`
    groups: tuple[int, ...] = ()  # each agent's task, where the attention on the own one is measured


TEN = "--seeds 10"
SPARSE_TEAM = "--set 'run.from_run=runs/marl/sparse-compare/pat/seed-{seed}'"
ADVICE = "transfer.options.keys=advice"
TWO_TASKS_TEAM = "--set 'run.from_run=runs/marl/two-tasks-compare/pat/seed-{seed}'"
COMPARISONS = {
    "sparse": Comparison(
        title="Sparse rewards, one task",
        question="Four agents are paid only where they stand on their goals. Does it help to teach each other? "
        "(The weight of PAT's attention entropy was chosen on seeds 0 and 1; of the rivals nothing was.)",
        command=f"marl/sparse {TEN} --methods none,pat,uniform,best_teacher,shared_weights,equal_start,shared_replay,"
        "maddpg,adhoc_visit,adhoc_td,lectr",
    ),
    "two-tasks": Comparison(
        title="Two tasks in one team",
        question="The actuators of two of the four push the other way. Whoever follows the wrong half learns nonsense. "
        "(That its attention needs no evening out was found on seeds 0 to 2.)",
        command=f"marl/two-tasks {TEN} --methods none,pat,best_teacher,shared_weights",
        groups=(0, 0, 1, 1),
    ),
    "newcomer": Comparison(
        title="A newcomer among trained agents",
        question="Agent 3 begins anew in a team that PAT has trained, whose members learn no more. How soon is it as "
        "good as they are, with PAT and alone (none)? (The weight of its imitation was chosen on seeds 0 and 1.)",
        command=f"marl/newcomer {TEN} {SPARSE_TEAM}",
    ),
    "newcomer-two-tasks": Comparison(
        title="A newcomer among agents of two tasks",
        question="Two of its three teachers know another task. Does following them ever make it worse than alone?",
        command=f"marl/newcomer-two-tasks {TEN} {TWO_TASKS_TEAM}",
    ),
    "dense": Comparison(
        title="Dense rewards",
        question="Everybody learns well alone. Does PAT do harm? (And does MADDPG learn where rewards are not sparse?)",
        command=f"marl/dense {TEN} --methods none,pat,maddpg",
    ),
    "spread": Comparison(
        title="simple_spread",
        question="The same on mpe2's cooperative task, with dense rewards.",
        command=f"marl/spread {TEN}",
    ),
    "keys": Comparison(
        title="What tells one teacher from another",
        question="The selector sees features of the teachers' networks, or only how their advice differs; the latter "
        "without the entropy that evens the attention out, for the next table. What does it cost here?",
        command=f"marl/sparse {TEN} --dir runs/marl/keys-compare --baseline features --variant features "
        f'--variant "advice {ADVICE} transfer.options.selector_entropy=0.0"',
    ),
    "eight": Comparison(
        title="A selector moves from a team of 4 to one of 8",
        question="Does a new team of eight start better with the selector of a trained team of four? Fresh selectors "
        "against moved ones, with keys of features and of advice. A moved selector of advice learns no more; so does "
        "frozen_advice, whose selector nobody has trained. (That it should not learn was found on one seed.)",
        command=f"marl/sparse {TEN} --dir runs/marl/eight-compare --baseline fresh --set world.options.agents=8 "
        f'--set run.frames=48000 --set run.evaluate_every=2400 --variant fresh --variant "fresh_advice {ADVICE}" '
        f'--variant "frozen_advice {ADVICE} transfer.options.selector_lr=0.0" '
        """--variant "moved run.selector_from='runs/marl/sparse-compare/pat/seed-{seed}'" """
        f"""--variant "moved_advice {ADVICE} transfer.options.selector_lr=0.0 """
        """run.selector_from='runs/marl/keys-compare/advice/seed-{seed}'\"""",
    ),
    "memory": Comparison(
        title="Memory",
        question="The goal is shown in the first five steps of fifty. Who remembers it? (Lightning's post-norm was "
        "added after a first comparison without it, in which four of ten seeds learned late; tried on seeds 1 and 7.)",
        command=f"marl/memory {TEN} --baseline memoryless --variant lightning "
        '--variant "lstm learner.memory.kind=lstm" --variant "memoryless learner.memory.kind=none"',
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)} (default: all)")
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(COMPARISONS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(COMPARISONS)}")
    if not arguments.page:
        for name in COMPARISONS:
            if name in (arguments.names or COMPARISONS):
                measure(name)
    PAGE.write_text(page())
    README.write_text(readme())
    print(f"written: {PAGE} and a table of {README}")


def measure(name: str) -> None:
    """Train what is not trained yet, and keep what it says."""
    comparison = COMPARISONS[name]
    subprocess.run([sys.executable, "-m", "fulmen", "marl", "compare", *shlex.split(comparison.command)], check=True)
    folder = Path("runs/marl") / f"{name}-compare"
    result = json.loads((folder / "comparison.json").read_text())
    if comparison.groups:
        result["attention_on_own_task"] = own_task_attention(folder, comparison.groups)
    methods = [row["method"] for row in result["rows"]]
    if rivals := [method for method in methods if "pat" in methods and method not in ("pat", result["baseline"])]:
        result["pat_less_rival"] = {rival: pat_less(folder, rival) for rival in rivals}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def own_task_attention(folder: Path, groups: tuple[int, ...]) -> dict[str, float]:
    """PAT's weight on teachers of the student's own task at the end, over the runs; by chance 1 in N - 1 a teacher."""
    tasks = np.array(groups)
    same = (tasks[:, None] == tasks) & ~np.eye(len(tasks), dtype=bool)
    runs = [read_curves(path) for path in sorted(folder.glob("pat/seed-*/metrics.jsonl"))]
    weights = [float((curves.attention[-1] * same).sum(axis=1).mean()) for curves in runs]
    return bootstrap_interval(weights)._asdict()


def pat_less(folder: Path, rival: str) -> dict[str, dict[str, float]]:
    """By how much PAT's area under the curve exceeds the rival's, paired by seed, in each way of acting."""
    areas = {}
    for method in ("pat", rival):
        runs = [read_curves(path) for path in sorted(folder.glob(f"{method}/seed-*/metrics.jsonl"))]
        areas[method] = {way: [area_under_curve(run.frames, getattr(run, way)) for run in runs] for way in WAYS}
    return {way: compare_paired(areas["pat"][way], areas[rival][way]).difference._asdict() for way in WAYS}


def page() -> str:
    """docs/marl-results.md, all of whose numbers come from the results."""
    parts = [
        "# marl: what the comparisons say\n",
        "Written by `python bench/teams.py --page` from `bench/results/teams`; `python bench/teams.py NAME` measures\n"
        "a table anew. How to read the columns: [marl.md](marl.md#the-comparison). The methods:\n"
        "[marl-rivals.md](marl-rivals.md). PAT's rivals are in the tables also where they are ahead of it.\n",
    ]
    for name, comparison in COMPARISONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(section(comparison, json.loads(path.read_text())))
    return "\n".join([*parts, speed()])


def readme() -> str:
    """README.md with its table of teams as the results have it."""
    before, rest = README.read_text().split(MARK)
    after = rest.split(END, 1)[1]
    head, rows = ["task", "no transfer", "PAT", "PAT, own policies only", "gain, paired by seed"], []
    for name, comparison in COMPARISONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists() and {"none", "pat"} <= (scores := by_method(json.loads(path.read_text()))).keys():
            none, pat = scores["none"], scores["pat"]
            areas = (interval(score["area"]) for score in (none["transfer"], pat["transfer"], pat["own"]))
            rows.append([comparison.title, *areas, interval(pat["transfer"]["versus"]["difference"], "+.3g")])
    return before + MARK + "\n".join([*markdown(head, rows), END]) + after


def by_method(result: dict) -> dict[str, dict]:
    return {row["method"]: row for row in result["rows"]}


def speed() -> str:
    """The figures of bench/marl.py, on a CPU beside the peers and on a GPU."""
    cpu, gpu = (json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text()) for name in ("marl", "marl-cuda"))
    keys = ("ours", "peer", "ratio")
    worlds = [
        [f"{int(count):,}", *(number(cpu["worlds"].get(count, {}).get(key)) for key in keys), number(row["ours"])]
        for count, row in gpu["worlds"].items()
    ]
    memory = [
        [count, *(number(side["memory"][count][key]) for side in (cpu, gpu) for key in ("lightning", "lstm", "ratio"))]
        for count in cpu["memory"]
    ]
    learning, one = cpu["learning"], cpu["worlds"]["1"]
    parts = [
        "## Speed",
        f"`python bench/marl.py --peers PYTHON` on {cpu['machine']['cores']} cores of an "
        f"{cpu['machine']['cpu']}, torch {cpu['machine']['torch']}, and",
        f"`python bench/marl.py --device cuda` on an {gpu['machine']['gpu']}, torch {gpu['machine']['torch']}. Ratios "
        "are of one run, in turns.",
        "",
        f"Worlds and learning together, spread with 3 agents: {number(learning['ours'])} frames a second, BenchMARL "
        f"{cpu['machine']['benchmarl']}'s IDDPG",
        f"{number(learning['peer'])} with equal networks, batches, worlds and updates per frame: "
        f"**{learning['ratio']:.1f} times**. On the GPU {number(gpu['learning']['ours'])}.",
        "",
        f"Worlds alone, steps of all worlds a second (one world of mpe2: {number(one['mpe2'])}):",
        "",
        *markdown(["worlds", "ours", f"VMAS {cpu['machine']['vmas']}", "ratio", "ours on the GPU"], worlds),
        "",
        "Steps of memory learned from a second, episodes of 1000 steps, by episodes in a batch:",
        "",
        *markdown(["episodes", "lightning", "LSTM", "ratio", "lightning, GPU", "LSTM, GPU", "ratio"], memory),
        "",
    ]
    return "\n".join(parts)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def section(comparison: Comparison, result: dict) -> str:
    command = comparison.command.replace(" --", " \\\n    --")
    lines = [
        f"## {comparison.title}",
        textwrap.fill(comparison.question, 120),
        "",
        "```sh",
        f"fulmen marl compare {command}",
        "```",
        "",
    ]
    for way, title in WAYS.items():
        lines += [f"{title[0].upper()}{title[1:]}, {result['frames']:,} frames:", "", *table(result, way), ""]
    if "attention_on_own_task" in result:
        lines += [
            f"Attention of PAT on teachers of the own task at the end: {interval(result['attention_on_own_task'])}.",
            "",
        ]
    if "pat_less_rival" in result:
        lines += ["PAT's area less a rival's, paired by seed:", "", *rivals_table(result["pat_less_rival"]), ""]
    machine = result["machine"]
    lines.append(
        f"{machine['cpu']}, torch {machine['torch']}, {machine['time'][:10]}, commit {machine.get('commit', '?')}.\n"
    )
    return "\n".join(lines)


def table(result: dict, way: str) -> list[str]:
    baseline, threshold = result["baseline"], result["threshold"]
    head = ["method", "runs", "area under curve", f"against {baseline}", "", "wins", "worse at", "final return"]
    head.append(f"frames to {threshold:.3g}")
    return markdown(head, [cells(row["method"], row[way]) for row in result["rows"]])


def rivals_table(differences: dict) -> list[str]:
    rows = [[rival, *(interval(ways[way], "+.3g") for way in WAYS)] for rival, ways in differences.items()]
    return markdown(["rival", *WAYS.values()], rows)


def cells(method: str, score: dict) -> list[str]:
    pairs, against = score["versus"], ["", "", ""]
    if pairs:
        relative = pairs["relative"]["value"]
        against = [interval(pairs["difference"], "+.3g"), "" if relative is None else f"{relative:+.0%}"]
        against.append(f"{pairs['wins']}/{pairs['pairs']}")
    worse = "" if score["worse"] is None else f"{score['worse']}/{score['evaluations']}"
    steps = score["steps"]["value"]
    reached = f"{score['reached']}/{score['runs']}"
    frames = f"{steps:,.0f} ({reached})" if steps is not None else f"({reached})"
    return [
        method,
        f"{score['runs']}",
        interval(score["area"]),
        *against,
        worse,
        f"{score['final']['value']:.3g}",
        frames,
    ]


def interval(estimate: dict, layout: str = ".3g") -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return f"{value:{layout}}" if low is None else f"{value:{layout}} [{low:{layout}}, {high:{layout}}]"


if __name__ == "__main__":
    main()
