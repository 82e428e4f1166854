"""What a figure was measured on: processor, versions, commit, time."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FEATURES = ("avx512_bf16", "amx_bf16")
"""What makes one processor's figures in bf16 another's."""


def describe_machine(*packages: str, device: torch.device | str = "cpu") -> dict[str, str | int]:
    """CPU, its cores, the GPU if `device` is one, versions of ours and of `packages`, the time.

    Where the package runs from its repository, the commit too, with a + where files of the package differ from it.
    """
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count() or 1}
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    machine["python"] = platform.python_version()
    for name in ("torch", "numpy", "fulmen", *packages):
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            continue
    # A repository that merely has the installed package somewhere below it is another project's.
    if _git("ls-files", Path(__file__).name):
        machine["commit"] = _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "..") else "")
    return machine | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    features = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return " ".join([next(names, platform.processor()), *(name for name in FEATURES if name in features)])


def _git(*arguments: str) -> str:
    """What git says in this file's folder; nothing where it fails or is not installed."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
