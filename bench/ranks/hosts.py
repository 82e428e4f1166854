"""Hosts with slow links between them, on one Linux machine: network namespaces on a bridge, slowed by traffic control.

    with hosts(4, rate="200mbit") as run:
        processes = [run(host, [sys.executable, "worker.py"]) for host in range(4)]

Needs root, `ip` and `tc`.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NETWORK, BRIDGE = "10.83.7", "fulmen0"


@contextmanager
def hosts(count: int, *, rate: str) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts commands on one of `count` hosts: `run(host, command, **environment)`, MASTER_ADDR being the first's.

    rate: of what each host sends, as tc writes it. Links are slowed, not delayed, which not every kernel can do.
    """
    names = [f"fulmen-{host}" for host in range(count)]
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names):
            _add_host(number, name, rate)
        yield lambda host, command, **environment: _start(names[host], command, environment)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, stderr=subprocess.DEVNULL)


def _add_host(number: int, name: str, rate: str) -> None:
    _ip("netns", "add", name)
    outside = f"{BRIDGE}h{number}"
    _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", outside, "master", BRIDGE)
    _ip("link", "set", outside, "up")
    _in(name, "ip", "link", "set", "lo", "up")
    _in(name, "ip", "address", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
    _in(name, "ip", "link", "set", "eth0", "up")
    bucket = ("tbf", "rate", rate, "burst", "128kb", "latency", "200ms")
    _in(name, "tc", "qdisc", "add", "dev", "eth0", "root", *bucket)


def _start(name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    shared = {"MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0"}
    return subprocess.Popen(["ip", "netns", "exec", name, *command], env=os.environ | shared | environment)


def _in(name: str, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", name, *command], check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
