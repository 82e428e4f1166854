"""The definition of a mixture of experts: every choice of every token on its own, in fp32 or better."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.ops.experts.routing import Routing


def naive_experts_mlp(x: Tensor, w13: Tensor, w2: Tensor, routing: Routing) -> Tensor:
    """See `fulmen.ops.experts.experts_mlp`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t], dtype=dtype)
        for slot, expert in enumerate(routing.experts[t].tolist()):
            if routing.kept is None or routing.kept[t, slot]:
                gate, up = (w13[expert].to(dtype) @ x[t].to(dtype)).chunk(2)
                row = row + routing.weights[t, slot] * (w2[expert].to(dtype) @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows).to(x.dtype)
