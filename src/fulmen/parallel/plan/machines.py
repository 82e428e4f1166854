"""Machines by their numbers: what a GPU holds and computes, and how fast it talks within its host and beyond it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from fulmen.config import UserError, check_numbers

GIGA, TERA = 10**9, 10**12

HOST_LATENCY, NETWORK_LATENCY, HOP_LATENCY = 10e-6, 15e-6, 2e-6
"""Seconds that a collective takes beside its bytes: always, where it leaves the host, for every host more. Rough."""

UNITS = {"memory": GIGA, "bf16": TERA, "int8": TERA, "bandwidth": GIGA, "link": GIGA, "network": GIGA}
"""What a number of `read_machine` is multiplied with."""


class Group(NamedTuple):
    """Ranks that talk to each other: how many, and how far apart neighbours are in the order of all ranks."""

    axis: str
    ranks: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hosts of equal GPUs. Rates are those of the data sheet, one way; the shares say what of them is reached.

    The shares are near what `fulmen bench` reached on an H100: a large product and the grouped ones of experts 0.66 of
    the matrix rate, softmax attention by cuDNN 0.5 of it, lightning attention forward 0.73 of the memory's bandwidth.
    """

    name: str
    memory: float  # bytes of a GPU
    bf16: float  # operations a second of dense products
    int8: float
    bandwidth: float  # bytes a second of a GPU's memory
    link: float  # bytes a second from a GPU to others of its host
    network: float  # bytes a second from a GPU to those of other hosts
    gpus: int = 8  # of a host
    products: float = 0.6  # share of the matrix rate
    attention: float = 0.5  # the same of softmax attention
    passes: float = 0.7  # share of the memory's bandwidth
    links: float = 0.8  # share of link and network
    source: str = "given by its numbers"

    def __post_init__(self) -> None:
        check_numbers(self, "above 0", lambda value: value > 0, *UNITS, "gpus")
        check_numbers(
            self, "above 0 and at most 1", lambda share: 0 < share <= 1, "products", "attention", "passes", "links"
        )

    def inside(self, group: Group) -> int:
        """How many ranks of a group share a host."""
        return min(group.ranks, max(1, self.gpus // group.stride))

    def seconds(self, kind: str, payload: float, group: Group) -> float:
        """Of one collective in which a rank gives `payload` bytes (see `traffic.sent`), nobody else talking.

        Rings over several hosts use the network card of every rank of the group in a host.
        """
        if group.ranks == 1:
            return 0.0
        inside = self.inside(group)
        hosts = math.ceil(group.ranks / inside)
        latency = HOST_LATENCY + (hosts > 1) * (NETWORK_LATENCY + HOP_LATENCY * (hosts - 1))
        link, network = self.link * self.links, self.network * self.links
        if kind == "all_to_all":
            near, away = (inside - 1) / group.ranks, (group.ranks - inside) / group.ranks
            return latency + payload * max(near / link, away / network)
        if kind == "send":
            return latency + payload / (network if hosts > 1 else link)
        return latency + sent(kind, payload, group.ranks) / (min(link, inside * network) if hosts > 1 else link)


def sent(kind: str, payload: float, ranks: int) -> float:
    """Bytes that a rank sends in a collective to which it gives a tensor of `payload` bytes, by the ring algorithms.

    Of an all-gather the tensor is its part of the result, of the others it is the whole input.
    """
    shares = {
        "all_gather": ranks - 1,
        "reduce_scatter": (ranks - 1) / ranks,
        "all_to_all": (ranks - 1) / ranks,
        "all_reduce": 2 * (ranks - 1) / ranks,
        "send": 1,
    }
    return shares[kind] * payload if ranks > 1 else 0.0


def _machine(name: str, source: str, *numbers: float, **others) -> Machine:
    names = ("memory", "bf16", "int8", "bandwidth", "link", "network")
    scaled = {key: number * UNITS[key] for key, number in zip(names, numbers, strict=True)}
    return Machine(name=name, source=source, **scaled, **others)


MACHINES = {
    "H100": _machine(
        "H100",
        "NVIDIA H100 SXM data sheet; NVLink 900 GB/s both ways; DGX H100: a 400 Gb/s card per GPU",
        *(80, 989.4, 1978.9, 3350, 450, 50),
    ),
    "H800": _machine(
        "H800",
        "as H100, NVLink 400 GB/s both ways and 400 Gb/s per GPU: DeepSeek, arXiv:2505.09343, section 4",
        *(80, 989.4, 1978.9, 3350, 200, 50),
    ),
    "H200": _machine(
        "H200",
        "NVIDIA H200 SXM data sheet; NVLink 900 GB/s both ways; DGX H200: a 400 Gb/s card per GPU",
        *(141, 989.4, 1978.9, 4800, 450, 50),
    ),
    "H20": _machine(
        "H20",
        "resellers' data sheets, network assumed; its share of products as MiniMax-01, section 3.3, reports",
        *(96, 148, 296, 4000, 450, 50),
        products=0.8,
    ),
    "A100": _machine(
        "A100",
        "NVIDIA A100 80GB SXM data sheet; NVLink 600 GB/s both ways; DGX A100: a 200 Gb/s card per GPU",
        *(80, 312, 624, 2039, 300, 25),
    ),
}
"""By name; memory in GB, products in TFLOP/s without sparsity, rates in GB/s one way."""


def read_machine(text: str) -> Machine:
    """A machine by its name, by its name with some numbers changed ("H800,link=450"), or by numbers alone.

    Numbers are those of `UNITS` in GB, TFLOP/s and GB/s one way, the GPUs of a host and the shares. Raises UserError.
    """
    parts = [part.strip() for part in text.split(",")]
    name = parts.pop(0) if "=" not in parts[0] else ""
    if name and name.upper() not in MACHINES:
        raise UserError(f"no machine named {name!r}; there are {', '.join(MACHINES)}, or give numbers: {_example()}")
    numbers = dict(_number(part) for part in parts)
    if name:
        return dataclasses.replace(MACHINES[name.upper()], **numbers)
    missing = [key for key in UNITS if key not in numbers]
    if missing:
        raise UserError(f"a machine without a name lacks {', '.join(missing)}: give all, as {_example()}")
    return Machine(name="machine", **numbers)


def _number(part: str) -> tuple[str, float]:
    key, _, value = part.partition("=")
    allowed = (*UNITS, "gpus", "products", "attention", "passes", "links")
    if key not in allowed:
        raise UserError(f"a machine has no {key!r}; it has {', '.join(allowed)}")
    try:
        return key, int(value) if key == "gpus" else float(value) * UNITS.get(key, 1)
    except ValueError:
        raise UserError(f"{key} of a machine must be a number, got {value!r}") from None


def _example() -> str:
    return "memory=80,bf16=989,int8=1979,bandwidth=3350,link=200,network=50,gpus=8"
