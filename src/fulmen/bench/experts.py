"""The mixture of experts beside its bare grouped products: what routing, sorting and permutation cost on top."""

import torch
import torch.nn.functional as F

from fulmen.bench.gpu import milliseconds, relative_error, require, show
from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.experts.naive import naive_experts_mlp

EXPERTS, HIDDEN, WIDTH, CHOICES = 32, 2048, 4096, 2
TOKENS = (2048, 8192, 32768)


def inputs(tokens: int) -> list[torch.Tensor]:
    shapes = ((tokens, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (tokens, EXPERTS))
    x, w13, w2, logits = (torch.randn(shape, device="cuda") for shape in shapes)
    w13, w2 = w13 / HIDDEN**0.5, w2 / WIDTH**0.5
    return [x.bfloat16().requires_grad_(), *(w.bfloat16().requires_grad_() for w in (w13, w2)), logits]


def bench_layer() -> list[dict]:
    """Milliseconds of the layer and of its products alone, forward and with backward."""
    x, w13, w2, logits = inputs(64)
    with torch.no_grad():
        truth = naive_experts_mlp(x.double(), w13.double(), w2.double(), route(logits, CHOICES))
    require({"out": relative_error(experts_mlp(x, w13, w2, route(logits, CHOICES)), truth)}, 1e-2)
    rows = []
    for tokens in TOKENS:
        x, w13, w2, logits = inputs(tokens)
        d_out = torch.randn_like(x)

        def layer(x=x, w13=w13, w2=w2, logits=logits):
            return experts_mlp(x, w13, w2, route(logits, CHOICES))

        def training(x=x, w13=w13, w2=w2, d_out=d_out, layer=layer):
            torch.autograd.grad(layer(), (x, w13, w2), d_out)

        with torch.no_grad():
            line = {"tokens": tokens, "ours": milliseconds(layer)}
        line["ours training"] = milliseconds(training)
        forward, whole = products(tokens, w13.detach(), w2.detach())
        line |= {"products": forward, "products training": whole}
        line |= {"on top": line["ours"] / forward - 1, "on top training": line["ours training"] / whole - 1}
        flop = 6 * tokens * CHOICES * HIDDEN * WIDTH
        rows.append(show(line | {"TFLOP/s of the products": flop / forward / 1e9}))
    return rows


@torch.no_grad()
def products(tokens: int, w13: torch.Tensor, w2: torch.Tensor) -> tuple[float, float]:
    """The grouped products of evenly spread choices: those of the forward pass, and all."""
    rows = tokens * CHOICES
    ends = torch.arange(rows // EXPERTS, rows + 1, rows // EXPERTS, device="cuda", dtype=torch.int32)
    x, act, gate_up = (
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for width in (HIDDEN, WIDTH, 2 * WIDTH)
    )

    def forward():
        F.grouped_mm(x, w13.mT, offs=ends)
        F.grouped_mm(act, w2.mT, offs=ends)

    def whole():
        forward()
        F.grouped_mm(x, w2, offs=ends)
        F.grouped_mm(gate_up, w13, offs=ends)
        F.grouped_mm(x.T, act, offs=ends)
        F.grouped_mm(gate_up.T, x, offs=ends)

    return milliseconds(forward), milliseconds(whole)


TABLES = {"layer": bench_layer}
