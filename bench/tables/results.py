"""Figures as bench/results has them, and how a table writes them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
