"""A model learns to see, stage by stage, and is measured after each: `make vision`.

    python bench/vision.py --dir runs --json bench/results/vision.json
    python bench/vision.py --scale 0.1          a tenth of each stage's steps: the way without the results

A text model (quickstart, vision-0-text), its encoder (CoCa), then the four stages of MiniMax-VL-01, each a recipe of
its own. What is there already is not done again; what was broken off goes on. Measured on pictures that all stages hold
out.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from fulmen.cli.tasks import load_task
from fulmen.evals.answers import answer_table, load_engine
from fulmen.evals.encoder import encoder_table
from fulmen.evals.text import text_table
from fulmen.model import choose_device
from fulmen.run.machine import describe_machine
from fulmen.train import train

PICTURES = ("emoji", "digits", "words", "charts")
HELD_OUT = 0.05
STAGES = (
    ("text model", "quickstart"),
    ("text about pictures", "vision-0-text"),
    ("encoder (CoCa)", "vision-coca"),
    ("I alignment", "vision-1-alignment"),
    ("II understanding", "vision-2-understanding"),
    ("III experience", "vision-3-experience"),
    ("IV preference", "vision-4-preference"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of all stages (default: 1)")
    parser.add_argument("--count", type=int, default=100, help="questions of each kind after each stage (default: 100)")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="that draw pictures")
    parser.add_argument("--until", choices=[name for _, name in STAGES], help="the last stage (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers there")
    arguments = parser.parse_args()
    stages = []
    for title, name in STAGES:
        kept = arguments.dir / name / "measured.json"
        if not kept.exists():
            row = {"stage": title, "recipe": name, "seconds": run_stage(name, arguments)} | measure(name, arguments)
            kept.write_text(json.dumps(row), encoding="utf-8")
        stages.append(json.loads(kept.read_text(encoding="utf-8")))
        print(stages[-1], flush=True)
        if name == arguments.until:
            return
    encoder = encoder_table(arguments.dir / "vision-coca", PICTURES, held_out=HELD_OUT, count=arguments.count)
    print(*encoder, sep="\n")
    if arguments.json:
        results = {"machine": describe_machine(device=choose_device("auto")), "stages": stages, "encoder": encoder}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def run_stage(name: str, arguments: argparse.Namespace) -> float:
    """Train as the recipe says unless that has been done; gives back the seconds that it took."""
    folder, began = arguments.dir / name, time.perf_counter()
    if not (folder / "checkpoint").exists():
        recipe, build = load_task(name, overrides(name, arguments))
        train(recipe, folder, build=build, resume=True, report=print)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return time.perf_counter() - began


def overrides(name: str, arguments: argparse.Namespace) -> list[str]:
    """Where the stage begins, and how many steps it takes."""
    recipe, _ = load_task(name)
    changes = [f"train.workers={arguments.workers}"]
    for section in ("model", "vision"):
        begun = getattr(getattr(recipe, section, None), "init_from", None)
        if begun is not None:
            changes.append(f'{section}.init_from="{arguments.dir / Path(begun).name}"')
    if arguments.scale != 1:
        schedule = recipe.schedule
        scaled = {key: max(1, round(getattr(schedule, key) * arguments.scale)) for key in ("steps", "warmup", "decay")}
        scaled["steps"] = max(scaled["steps"], scaled["warmup"] + scaled["decay"])
        changes += [f"schedule.{key}={value}" for key, value in scaled.items()]
        if sizes := getattr(recipe.model, "image_sizes", ()):
            changes.append(f"model.image_sizes={[[round(step * arguments.scale), size] for step, size in sizes]}")
    return changes


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """Answers of a stage that sees, and bits per byte of text of each that writes."""
    folder, found = arguments.dir / name, {}
    if name == "vision-coca":
        return found
    found["bits per byte"] = text_table(folder, ["stdlib"], held_out=HELD_OUT, max_tokens=16384)[0]["bits per byte"]
    if name not in ("quickstart", "vision-0-text"):
        engine = load_engine(folder, device=str(choose_device("auto")), thumbnail=name == "vision-1-alignment")
        found["answers"] = answer_table(engine, PICTURES, held_out=HELD_OUT, count=arguments.count)
        del engine
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
