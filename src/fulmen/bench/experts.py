"""The mixture of experts beside its bare grouped products: what routing, sorting and permutation cost on top."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fulmen.bench.gpu import free_memory, milliseconds_in_turns, relative_error, require, show
from fulmen.ops.experts import experts_mlp, route
from fulmen.ops.experts.grouped import Plan, _plan
from fulmen.ops.experts.naive import naive_experts_mlp
from fulmen.ops.swiglu import swiglu, swiglu_backward

EXPERTS, HIDDEN, WIDTH, CHOICES = 32, 2048, 4096, 2
TOKENS = (2048, 8192, 32768)


def inputs(tokens: int) -> list[torch.Tensor]:
    shapes = ((tokens, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (tokens, EXPERTS))
    x, w13, w2, logits = (torch.randn(shape, device="cuda") for shape in shapes)
    w13, w2 = w13 / HIDDEN**0.5, w2 / WIDTH**0.5
    return [x.bfloat16().requires_grad_(), *(w.bfloat16().requires_grad_() for w in (w13, w2)), logits]


def bench_layer() -> list[dict]:
    """Milliseconds of the layer, and of its products and its activation alone, of the same routing and in turns."""
    x, w13, w2, logits = inputs(64)
    with torch.no_grad():
        truth = naive_experts_mlp(x.double(), w13.double(), w2.double(), route(logits, CHOICES))
    require({"out": relative_error(experts_mlp(x, w13, w2, route(logits, CHOICES)), truth)}, 1e-2)
    rows = []
    for tokens in TOKENS:
        free_memory()
        times = milliseconds_in_turns(calls(tokens))
        rows.append(show({"tokens": tokens} | summary(times, 6 * tokens * CHOICES * HIDDEN * WIDTH)))
    return rows


def calls(tokens: int) -> dict[str, Callable]:
    """What is compared, by name: forward, and with backward."""
    x, w13, w2, logits = inputs(tokens)
    d_out = torch.randn_like(x)

    def layer() -> torch.Tensor:
        return experts_mlp(x, w13, w2, route(logits, CHOICES))

    def training() -> None:
        torch.autograd.grad(layer(), (x, w13, w2), d_out)

    plan = _plan(route(logits, CHOICES), x.dtype)
    return {"layer": torch.no_grad()(layer), "layer training": training} | bare_calls(plan, w13.detach(), w2.detach())


def bare_calls(plan: Plan, w13: torch.Tensor, w2: torch.Tensor) -> dict[str, Callable]:
    """The grouped products of that routing, and the passes of the activation."""
    rows, ends = len(plan.tokens), plan.ends
    x, act, gate_up = (
        torch.randn(rows, width, device=w2.device, dtype=w2.dtype) for width in (HIDDEN, WIDTH, 2 * WIDTH)
    )

    def products() -> None:
        F.grouped_mm(x, w13.mT, offs=ends)
        F.grouped_mm(act, w2.mT, offs=ends)

    def products_training() -> None:
        products()
        F.grouped_mm(x, w2, offs=ends)
        F.grouped_mm(x.T, act, offs=ends)
        F.grouped_mm(gate_up.T, x, offs=ends)
        F.grouped_mm(gate_up, w13, offs=ends)

    def activation_training() -> None:
        swiglu(gate_up)
        swiglu_backward(act, gate_up, plan.weights)

    return {
        "products": products,
        "products training": products_training,
        "activation": lambda: swiglu(gate_up),
        "activation training": activation_training,
    }


def summary(times: dict[str, float], flop: float) -> dict[str, float]:
    """Times, and what is on top of the products, as a share of them; `flop` are the products' of the forward pass."""
    line = dict(times)
    for suffix in ("", " training"):
        layer, products, activation = (times[name + suffix] for name in ("layer", "products", "activation"))
        line[f"on top{suffix}"] = (layer - activation - products) / products
        line[f"on top with activation{suffix}"] = (layer - products) / products
    line["TFLOP/s of the products"] = flop / times["products"] / 1e9
    line["TFLOP/s of the products training"] = 3 * flop / times["products training"] / 1e9
    return line


TABLES = {"layer": bench_layer}
