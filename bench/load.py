"""`fulmen serve` under load and in trouble: clients that stay, leave, are refused; then SIGTERM while streams run.

    python bench/load.py                                               a tiny random model, 500 clients, two minutes
    python bench/load.py runs/quickstart --clients 50 --seconds 15 --json FILE

Exit status 1, with a line for each, if an answer was incomplete, a request hung or failed, or the server still holds
pages, slots, connections or much more memory once everybody has left. It reads /proc, so it needs Linux.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from clients import COMPLETIONS, MODEL, OUTCOMES, PATIENCE, Load, gauges, request
from fulmen.checkpoint import make_tiny
from fulmen.run.machine import describe_machine

SERVER = {"port": 0, "grace": 5, "max-waiting": 128, "max-context": 512, "device": "cpu", "name": MODEL}
HELD = ("pages_in_use", "requests_running", "requests_waiting", "http_requests_in_flight")
"""Gauges that must be 0 when nobody asks."""
SHOWN = ("prompt_tokens_total", "generated_tokens_total", "pages_cached", "preemptions_total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="a checkpoint's folder (default: a tiny random one)")
    parser.add_argument("--clients", type=int, default=500, help="at the same time (default: 500)")
    parser.add_argument("--seconds", type=float, default=120, help="that they ask for (default: 120)")
    parser.add_argument("--leaving", type=float, default=0.3, help="part of requests that are left (default: 0.3)")
    parser.add_argument("--memory", default="0.5", metavar="GB", help="the server's (default: 0.5)")
    parser.add_argument(
        "--growth", type=float, default=0.1, help="of resident memory, at most, in a minute or more (default: 0.1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.path is None:
            arguments.path = Path(folder) / "tiny"
            make_tiny(arguments.path)
        results = asyncio.run(run(arguments, Path(folder) / "stderr"))
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe_machine("uvicorn"), **results}, indent=2) + "\n")
    wrong = faults(results, arguments.growth)
    print("\n".join(f"wrong: {line}" for line in wrong) or "all is well")
    sys.exit(bool(wrong))


def faults(results: dict, growth: float) -> list[str]:
    """What must not be, one line each."""
    counts = results["requests"]
    lines = [f"{counts[name]} requests {name}" for name in OUTCOMES[3:] if counts[name]]
    lines += [f"{name} is {value} when nobody asks" for name, value in results["held at the end"].items() if value]
    before, after = results["open files"].values()
    stop, grown = results["SIGTERM"], results["resident memory"]["growth"]
    lines += [f"{after} files are open, {before} were"] * (after > before)
    # In a shorter run pages and states are still being written for the first time.
    lines += [f"resident memory grew by {grown:.1%}"] * (grown > growth and results["seconds"] >= 60)
    lines += [f"{stop['incomplete']} streams had no proper end after SIGTERM"] * bool(stop["incomplete"])
    lines += [f"exit code {stop['exit code']} after SIGTERM"] * (stop["exit code"] != 128 + signal.SIGTERM)
    lines += ["no request was finished"] * (not counts["finished"])
    lines += [f"on standard error: {line}" for line in results["standard error"]]
    return lines


async def run(arguments: argparse.Namespace, log: Path) -> dict:
    command = [sys.executable, "-m", "fulmen", "serve", arguments.path, "--memory", arguments.memory]
    command += [word for name, value in SERVER.items() for word in (f"--{name}", value)]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=stderr, stderr=stderr)
    try:
        port = await ready(process, log)
        load = Load(port)
        results = await under_load(load, process.pid, arguments)
        results["SIGTERM"] = await stop(load, process)
    finally:
        if process.returncode is None:
            process.kill()
    results["standard error"] = [
        line for line in log.read_text().splitlines() if re.search("Error|Traceback|ERR", line)
    ]
    return results


async def ready(process: asyncio.subprocess.Process, log: Path) -> int:
    """The port, once requests are taken."""
    while not (found := re.search(r"http://[^/]*:(\d+)/v1", log.read_text())):
        if process.returncode is not None:
            sys.exit(f"the server has not started:\n{log.read_text()}")
        await asyncio.sleep(0.05)
    return int(found[1])


async def under_load(load: Load, pid: int, arguments: argparse.Namespace) -> dict:
    end, _ = await load.stream(*request(random.Random(0)))  # what is opened at the first request stays open
    if end != "finished":
        sys.exit(f"wrong: the first request is {end}")
    await until_idle(load.port)
    files, begun, resident, load.events = open_files(pid), time.monotonic(), {}, 0
    end = begun + arguments.seconds
    clients = [asyncio.create_task(load.client(number, end, arguments.leaving)) for number in range(arguments.clients)]
    for name, second in (("early", min(20, arguments.seconds / 4)), ("half", arguments.seconds / 2)):
        await asyncio.sleep(begun + second - time.monotonic())
        resident[f"{name} MB"] = resident_megabytes(pid)
    await asyncio.gather(*clients)
    seconds = time.monotonic() - begun
    held, others = await until_idle(load.port)
    resident["end MB"] = resident_megabytes(pid)
    resident["growth"] = resident["end MB"] / resident["early MB"] - 1
    return {
        "clients": arguments.clients,
        "seconds": seconds,
        "requests": {name: load.counts[name] for name in OUTCOMES},
        "events a second": load.events / seconds,
        "server": others,
        "held at the end": held,
        "resident memory": resident,
        "open files": {"before": files, "after": open_files(pid)},
    }


async def stop(load: Load, process: asyncio.subprocess.Process) -> dict:
    """SIGTERM while streams run: each must end with its reason or an error, then [DONE]."""
    body = {"prompt": "decay of", "temperature": 1, "ignore_eos": True}
    bodies = [body | {"max_tokens": length} for length in (400, 400, 400, 400, 20, 20, 20, 20)]
    begun = [asyncio.Event() for _ in bodies]
    streams = [load.stream(COMPLETIONS, body, at=event.set) for body, event in zip(bodies, begun, strict=True)]
    tasks = [asyncio.create_task(stream) for stream in streams]
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(event.wait() for event in begun))
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ends = Counter(end for end, _ in await asyncio.gather(*tasks))
    code = await asyncio.wait_for(process.wait(), PATIENCE)
    counted = {name: ends[name] for name in ("finished", "broken off", "incomplete")}
    return counted | {"exit code": code, "seconds": time.monotonic() - asked}


async def until_idle(port: int) -> tuple[dict[str, float], dict[str, float]]:
    """(what is held, other numbers) once nothing is held any more, or after half a minute."""
    end = time.monotonic() + 30
    while True:
        found = await gauges(port)
        if not any(found[name] for name in HELD) or time.monotonic() > end:
            break
        await asyncio.sleep(0.1)
    return {name: found[name] for name in HELD}, {name: found[name] for name in SHOWN}


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


if __name__ == "__main__":
    main()
