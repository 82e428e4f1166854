"""`fulmen marl train`, `compare` and `render`."""

import argparse
import functools
import sys
from pathlib import Path

from fulmen.cli.parts import count, recipe_arguments, stopped, verb
from fulmen.config import load_recipe


def add(verbs) -> None:
    text = "teams of agents that teach each other: train, compare, render"
    marl = verb(verbs, "marl", None, text, "fulmen marl train marl/sparse")
    verbs = marl.add_subparsers(metavar="VERB [OPTIONS]", required=True)
    parser = verb(
        verbs, "train", _train, "train a team as a recipe says", "fulmen marl train marl/sparse --set run.seed=1"
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last good snapshot in the run's folder")
    recipe_arguments(parser, "runs/marl/NAME-OF-RECIPE")
    parser = verb(
        verbs,
        "compare",
        _compare,
        "train a recipe's team by several methods and seeds, and print the table",
        "fulmen marl compare marl/sparse --methods none,pat --seeds 10 --workers 2",
    )
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    parser.add_argument("--methods", help="names with commas between (default: none,pat; without them with --variant)")
    parser.add_argument(
        "--variant",
        metavar="'NAME A.B=VALUE ...'",
        action="append",
        default=[],
        help="a method of your own: a name, and keys of the recipe to override; may be given several times",
    )
    parser.add_argument("--baseline", metavar="NAME", default="none", help="method to compare with (default: none)")
    parser.add_argument("--seeds", type=count, default=10, help="runs of each method (default: 10)")
    parser.add_argument("--workers", type=count, help="processes at a time (default: cores / run.threads)")
    recipe_arguments(parser, "runs/marl/NAME-OF-RECIPE-compare")
    parser = verb(verbs, "render", _render, "draw an episode of a trained team", "fulmen marl render runs/marl/sparse")
    parser.add_argument("path", type=Path, help="the folder of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the episode (default: 0)")
    parser.add_argument("--own", action="store_true", help="by the agents' own policies, without transfer")
    parser.add_argument("--out", type=Path, help="the GIF to write (default: plots/episode.gif in the run's folder)")


def _train(arguments: argparse.Namespace) -> int:
    from fulmen.marl import MarlRecipe, train

    recipe = load_recipe(arguments.recipe, MarlRecipe, arguments.set)
    folder = arguments.dir or Path("runs/marl") / Path(arguments.recipe).stem
    result = train(recipe, folder, resume=arguments.resume, report=functools.partial(print, flush=True))
    if result.checkpoint is None:
        place = f"frame {result.frames:,} of {recipe.run.frames:,}"
        return stopped(["marl", "train"], folder, place, result.stopped_by)
    print(f"checkpoint: {result.checkpoint}\npictures:   {', '.join(map(str, result.pictures))}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fulmen.marl import MarlRecipe
    from fulmen.marl.compare import WIDTH, compare, parse_variant

    recipe = load_recipe(arguments.recipe, MarlRecipe, arguments.set)
    folder = arguments.dir or Path("runs/marl") / f"{Path(arguments.recipe).stem}-compare"
    named = arguments.methods or ("" if arguments.variant else "none,pat")
    methods = [name.strip() for name in named.split(",") if name.strip()]
    methods += map(parse_variant, arguments.variant)
    comparison = compare(
        recipe,
        folder,
        methods=methods,
        seeds=arguments.seeds,
        workers=arguments.workers,
        baseline=arguments.baseline,
    )
    # A table that a file keeps or a pipe takes is not cut to a terminal's width.
    Console(width=None if sys.stdout.isatty() else WIDTH).print(comparison)
    print(f"\ntables, curves and plots: {folder}")
    return 1 if comparison.failures else 0


def _render(arguments: argparse.Namespace) -> int:
    from fulmen.marl import render_episode

    print(f"wrote {render_episode(arguments.path, seed=arguments.seed, out=arguments.out, own=arguments.own)}")
    return 0
