"""What minimax-text-01 needs of GPUs, to train and to serve, by the planner: no GPU is needed, a few minutes are.

    python bench/plan.py                 writes bench/results/plan.json and docs/images/plan-scaling.png
    python bench/plan.py --draw          draws the figures that are there

Beside it the planner's figures for what `fulmen bench train` measured on one H100.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from fulmen.bench.model import CONFIG
from fulmen.model import ModelConfig
from fulmen.parallel import MeshSizes
from fulmen.parallel.plan import MACHINES, Job, Machine, Placement, Plan, Serving, find_plan
from fulmen.run.figure import COLORS, INK, make_figure, save_figure, style_axes
from fulmen.run.machine import describe_machine
from fulmen.serve import EngineSettings, plan_memory
from record import RESULTS, write_results

MODEL = ModelConfig.preset("minimax-text-01")
CONTEXTS = {"8K": 2**13, "128K": 2**17, "1M": 2**20}
GPUS = tuple(2**power for power in range(3, 12))
BATCH, BATCHES = 2**27, tuple(2**power for power in range(24, 28))  # tokens: 16M to 128M, as MiniMax-01's pretraining
MANY = 1024
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "plan-scaling.png"
PARTS = {
    "experts' products": "experts' products",
    "projections and head": "projections and head",
    "softmax attention": "softmax attention",
    "lightning attention": "lightning attention",
    "passes over memory": "norms, SwiGLU, permuting",
    "computed again": "layers computed again",
    "waiting": "waiting for others",
    "pipeline bubble": "pipeline bubble",
}
"""Of a step, and how a picture calls them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="plan nothing: draw what bench/results/plan.json has")
    if not parser.parse_args().draw:
        results = {
            "training": list(training()),
            "batches": list(batches()),
            "machines": list(machines()),
            "serving": list(serving()),
            "measured": list(measured()),
        }
        print(f"wrote {write_results('plan', describe_machine(), results)}")
    draw(json.loads((RESULTS / "plan.json").read_text()))
    print(f"wrote {PICTURE}")


def training() -> Iterator[dict]:
    """The best mesh for each context and number of H800s."""
    for (name, context), gpus in itertools.product(CONTEXTS.items(), GPUS):
        yield row({"context": name, "GPUs": gpus}, MACHINES["H800"], context, BATCH, gpus)


def batches() -> Iterator[dict]:
    """The largest cluster with smaller batches."""
    for batch in BATCHES:
        yield row({"batch": batch, "GPUs": GPUS[-1]}, MACHINES["H800"], CONTEXTS["8K"], batch, GPUS[-1])


def machines() -> Iterator[dict]:
    """The same on each machine, with what it is."""
    for name, machine in MACHINES.items():
        figures = {key: value for key, value in dataclasses.asdict(machine).items() if key != "name"}
        for context, tokens in CONTEXTS.items():
            yield row({"machine": name, "context": context} | figures, machine, tokens, BATCH, MANY)


def row(names: dict, machine: Machine, context: int, batch: int, gpus: int) -> dict:
    """One search; where nothing fits, what needs least."""
    found = find_plan(Job(config=MODEL, context=context, batch=batch), machine, gpus)
    line = names | {"fits": found.plan.fits, "tried": found.tried, "refused": found.refused} | describe(found.plan)
    line |= {"why": found.reasons}
    print({key: value for key, value in line.items() if key not in ("parts", "memory parts", "why")}, flush=True)
    return line


def describe(plan: Plan) -> dict:
    placement, estimate = plan.placement, plan.estimate
    return {
        "mesh": dataclasses.asdict(placement.sizes),
        "samples of a row": placement.samples,
        "rows of a replica": placement.micro_batches,
        "layers computed again": placement.checkpoint,
        "weights kept gathered": placement.keep,
        "token groups": placement.piece.token_groups,
        "GB a GPU": plan.needs / 1e9,
        "largest part": plan.largest,
        "seconds": estimate.seconds,
        "tokens a second": plan.tokens_per_second,
        "MFU": plan.mfu,
        "hidden": estimate.hidden,
        "lost most": plan.lost,
        "lost": estimate.parts[plan.lost] / estimate.seconds,
        "GB sent": sum(record.sent for record in plan.traffic) / 1e9,
        "memory parts": {name: number / 1e9 for name, number in plan.memory.items()},
        "parts": estimate.parts,
    }


def serving() -> Iterator[dict]:
    """int8 weights and a context of a million tokens on eight GPUs."""
    settings, context, devices = EngineSettings(max_context=1_000_000), 1_000_000, 8
    for name in ("H800", "H100", "H20"):
        machine = MACHINES[name]
        budget = round(devices * machine.memory * 0.9)
        plan = plan_memory(
            MODEL, settings, budget=budget, weights=MODEL.weight_bytes("int8"), is_int8=True, device="cuda"
        )
        chunk = settings.on("cuda").chunk_tokens
        served = Serving(model=MODEL, machine=machine, devices=devices, dtype="int8")
        yield {
            "machine": name,
            "GPUs": devices,
            "context": context,
            "weights, GB a GPU": served.weights / 1e9,
            "states of a sequence, MB a GPU": served.state / 1e6,
            "keys and values, GB a GPU": context * served.key_values / 1e9,
            "sequences": plan.slots,
            "tokens in all": plan.pages * plan.page_size,
            "prompt, s": served.prefill_seconds(context, chunk),
            "next token, ms": 1e3 * served.decode_seconds(1, context),
        }


def measured() -> Iterator[dict]:
    """Steps of the model of 950 M on one GPU, as `fulmen bench train` measured them, beside the planner's figures."""
    results = json.loads((RESULTS / "train.json").read_text())
    for line in results["lengths"]:
        context = line["length"]
        if line["layers"] != "hybrid":
            continue
        step, micro, again = max(2**17, context), max(2**16, context), line["activations"] != "kept"
        placement = Placement(
            job=Job(config=CONFIG, context=context, batch=step),
            sizes=MeshSizes().fitted(1),
            samples=micro // context,
            checkpoint=again,
            keep=not again,
            load=1.0,
        )
        plan = Plan(placement, MACHINES["H100"])
        yield {
            "length": context,
            "tokens a second": line["tokens a second"],
            "planned": plan.tokens_per_second,
            "GB": line["peak GB"],
            "planned GB": plan.needs / 1e9,
        }


def draw(results: dict) -> None:
    """Tokens a second against the number of GPUs, and where the time of a step goes."""
    figure, rows = make_figure(11, 5.4), [line for line in results["training"] if line["fits"]]
    title = f"minimax-text-01 on H800s, {BATCH // 2**20}M tokens a step: the planner's estimate\n"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    draw_scaling(left, rows)
    draw_parts(right, [line for line in rows if line["GPUs"] in (MANY // 4, MANY)])
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, labelcolor=INK, edgecolor="none", fontsize=9)
    PICTURE.parent.mkdir(exist_ok=True)
    save_figure(figure, PICTURE)


def draw_scaling(axes, rows: list[dict]) -> None:
    """Beside each point the share of the peak rate."""
    for color, context in zip(COLORS, CONTEXTS, strict=False):
        found = [line for line in rows if line["context"] == context]
        xs, ys = [line["GPUs"] for line in found], [line["tokens a second"] for line in found]
        style = dict(linewidth=1.6, marker="o", markersize=5, markeredgecolor="white")
        axes.plot(xs, ys, color=color, label=f"samples of {context}", **style)
        # The line in the middle has its numbers below, where no other one runs.
        beside = dict(xytext=(6, -11), ha="left") if context == "128K" else dict(xytext=(-4, 6), ha="right")
        for x, y, line in zip(xs, ys, found, strict=True):
            where = dict(textcoords="offset points", **beside)
            axes.annotate(f"{line['MFU']:.0%}", (x, y), color=color, fontsize=9, **where)
    style_axes(axes, "GPUs (with fewer it does not fit); beside the points MFU", "tokens a second")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = sorted({line["GPUs"] for line in rows})
    axes.set_xticks(shown, [str(number) for number in shown])
    axes.set_xlim(shown[0] / 1.5, shown[-1] * 1.4)
    axes.set_yticks([1e5, 3e5, 1e6, 3e6], ["0.1 M", "0.3 M", "1 M", "3 M"])
    axes.minorticks_off()
    axes.legend(labelcolor=INK, edgecolor="none", loc="upper left")


def draw_parts(axes, rows: list[dict]) -> None:
    """A bar for each context and number of GPUs, cut into the parts of a step."""
    names, left = [f"{line['context']} on {line['GPUs']}" for line in rows], [0.0] * len(rows)
    for color, (part, label) in zip(COLORS, PARTS.items(), strict=False):
        widths = [100 * share(line, part) for line in rows]
        bars = axes.barh(names, widths, 0.6, left, color=color, label=label, edgecolor="white", linewidth=1)
        # A narrow piece has no room for its number.
        numbers = [f"{width:.0f}" if width >= 3 else "" for width in widths]
        axes.bar_label(bars, numbers, label_type="center", color="white", fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    style_axes(axes, "% of a step's time", "")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()


def share(line: dict, part: str) -> float:
    """Of a step's time; all that is waited for is one part."""
    seconds = sum(value for name, value in line["parts"].items() if name.startswith(part))
    return seconds / line["seconds"]


if __name__ == "__main__":
    main()
