"""Expert layers spread over ranks, tokens in groups, and the router that ranks share."""

import torch
import torch.distributed as dist

from fulmen.model import ModelConfig
from fulmen.ops.experts import route
from fulmen.parallel.capacity import drop_rates
from fulmen.parallel.experts import spread_experts_mlp
from ranks import planned
from ranks.check import expert_groups
from ranks.timing import both, random, timed

SIZES = {
    "cpu": dict(tokens=1024, hidden=256, width=512, experts=8),
    "cuda": dict(tokens=16384, hidden=6144, width=9216, experts=8),
}
GROUPS = (1, 2, 4, 8)


def experts(device: torch.device) -> list[dict]:
    """All ranks along ep, along etp, and of four and more along both; tokens in 1, 2, 4, 8 groups."""
    sizes, rows = SIZES[device.type], []
    for name, ep, etp in expert_groups():
        here, width = sizes["experts"] // ep.size(), sizes["width"] // etp.size()
        x = random(device, sizes["tokens"], sizes["hidden"])
        w13 = random(device, here, 2 * width, sizes["hidden"])
        w2 = random(device, here, sizes["hidden"], width)
        routing = route(torch.randn(sizes["tokens"], sizes["experts"], device=device), 2)
        for groups in GROUPS:

            def step(ep=ep, etp=etp, x=x, w13=w13, w2=w2, routing=routing, groups=groups) -> None:
                both(spread_experts_mlp(x, w13, w2, routing, ep=ep, etp=etp, groups=groups))

            row = {"mesh": name, "groups": groups} | timed(step, device)
            if device.type == "cuda":
                row["planned ms"] = planned.expert_layer(_config(sizes), sizes["tokens"], ep.size(), etp.size(), groups)
            rows.append(row)
            if dist.get_rank() == 0:
                print(rows[-1], flush=True)
    return rows


def _config(sizes: dict[str, int]) -> ModelConfig:
    """Of a model with such layers, as far as the planner asks for it."""
    keys = {"hidden_size": sizes["hidden"], "expert_size": sizes["width"], "num_experts": sizes["experts"]}
    return ModelConfig.preset("minimax-text-01", **keys)


def router() -> list[dict]:
    """Choices dropped with a capacity of 1.0 on routing that each rank skews its own way, with and without sharing."""
    rows = []
    for seed in range(3):
        torch.manual_seed(seed)
        for skew in (0.0, 1.0, 2.0):
            logits = [torch.randn(1024, 16) + skew * torch.randn(16) for _ in range(8)]
            own, shared = drop_rates(logits, 2, 1.0)
            rows.append({"seed": seed, "skew": skew, "each rank's own": own, "global": shared})
    return rows
