"""`fulmen bench`."""

import argparse
from pathlib import Path

from fulmen.cli.parts import verb


def add(verbs) -> None:
    from fulmen.bench import NAMES

    width = max(map(len, NAMES))
    parser = verb(
        verbs,
        "bench",
        _bench,
        "time ours beside every peer that is installed",
        "fulmen bench lightning --json lightning.json\n  fulmen bench lightning --draw lightning.json docs/images"
        "\n\nbenchmarks:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in NAMES.items()),
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="one of those below")
    parser.add_argument("--only", metavar="TABLE", help="one of its tables instead of all")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers there")
    pictures = "measure nothing: draw the numbers of a --json FILE into FOLDER"
    work.add_argument("--draw", type=Path, nargs=2, metavar=("FILE", "FOLDER"), help=pictures)


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.draw is not None:
        from fulmen.bench.plots import draw

        for path in draw(arguments.name, *arguments.draw, only=arguments.only):
            print(f"wrote {path}")
        return 0
    from fulmen.bench import run

    run(arguments.name, arguments.only, arguments.json)
    return 0
