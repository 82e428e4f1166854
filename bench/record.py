"""How the figures of a bench script are kept."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, machine: dict, results: dict) -> Path:
    """Keep a run's figures as bench/results/NAME.json; the newest run replaces the one before, git has the others."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine} | results, indent=2) + "\n")
    return path
