"""What a figure was measured on: machine, versions, commit; and how results are kept."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe_machine(*packages: str, device: torch.device | str = "cpu") -> dict[str, str | int]:
    """CPU, threads, GPU if `device` is one, versions of PyTorch and the peers, the commit (with + for uncommitted
    changes), the time."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    commit = _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "src") else "")
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **gpu,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages)},
        "commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_results(name: str, machine: dict, results: dict) -> Path:
    """Keep a run's figures as bench/results/NAME.json; the newest run replaces the one before, git has the others."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine} | results, indent=2) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    features = {"avx512_bf16", "amx_bf16"} & set(next((x for x in lines if x.startswith("flags")), "").split())
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return " ".join([name, *sorted(features)])


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=here, check=False).stdout.strip()
    except OSError:
        return ""
