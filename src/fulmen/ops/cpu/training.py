"""The passes between the matrix products of training, in C (`training.c`), for fp32 and bf16 on the CPU."""

import torch
from torch import Tensor

from fulmen.ops.cpu.compiled import load, new_empty

SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def fuses(*tensors: Tensor) -> bool:
    """Whether the kernels may compute with these tensors as they lie: `supports`, and contiguous."""
    return all(tensor.is_contiguous() for tensor in tensors) and supports(*tensors)


def supports(*tensors: Tensor) -> bool:
    """Whether there are kernels for such tensors: fp32 or bf16 on the CPU, and nobody compiles.

    The first call builds the library (a second or two).
    """
    if torch.compiler.is_compiling() or any(not t.is_cpu or t.dtype not in SUFFIX for t in tensors):
        return False
    return load() is not None


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up: [R, 2F] to [R, F]."""
    rows, width = gate_up.shape
    act = gate_up.new_empty(rows, width // 2)
    _kernel("swiglu", gate_up)(act.data_ptr(), gate_up.data_ptr(), rows, width // 2, torch.get_num_threads())
    return act


def swiglu_backward(d_act: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate_up [R, 2F], weights * act [R, F] and d_weights [R] fp32 of rows that count with weights [R, 1].

    d_act [R, F] is the gradient of an unweighted row's activation; all in one dtype.
    """
    rows, f = d_act.shape
    d_gate_up, weighted_act = torch.empty_like(gate_up), torch.empty_like(d_act)
    d_weights = new_empty(rows)
    outputs = (d_gate_up.data_ptr(), weighted_act.data_ptr(), d_weights.data_ptr())
    inputs = (d_act.data_ptr(), gate_up.data_ptr(), weights.data_ptr())
    _kernel("swiglu_backward", gate_up)(*outputs, *inputs, rows, f, torch.get_num_threads())
    return d_gate_up, weighted_act, d_weights


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x [..., D] and 1 / rms [..., 1] fp32; weight [D] fp32."""
    size = len(weight)
    y, inverse = torch.empty_like(x), new_empty(*x.shape[:-1], 1)
    pointers = (y.data_ptr(), inverse.data_ptr(), x.data_ptr(), weight.data_ptr())
    _kernel("rms_norm_forward", x)(*pointers, x.numel() // size, size, eps, torch.get_num_threads())
    return y, inverse


def rms_norm_backward(d_y: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """d_x, like x, and d_weight [D] fp32."""
    size, threads = len(weight), torch.get_num_threads()
    d_x, d_weight = torch.empty_like(x), new_empty(threads, size)
    pointers = (t.data_ptr() for t in (d_x, d_weight, d_y, x, inverse, weight))
    _kernel("rms_norm_backward", x)(*pointers, x.numel() // size, size, threads)
    return d_x, d_weight.sum(dim=0)


def causal_softmax_(scores: Tensor, scale: float) -> None:
    """Scores [..., n, n] become the probabilities of causal attention, zero above the diagonal."""
    n = scores.shape[-1]
    _kernel("causal_softmax", scores)(scores.data_ptr(), scores.numel() // n**2, n, scale, torch.get_num_threads())


def causal_softmax_backward_(d_probs: Tensor, probs: Tensor, scale: float) -> None:
    """The gradients of `causal_softmax_`'s probabilities [..., n, n] become those of its scores."""
    n, kernel = probs.shape[-1], _kernel("causal_softmax_backward", probs)
    kernel(d_probs.data_ptr(), probs.data_ptr(), probs.numel() // n**2, n, scale, torch.get_num_threads())


def cross_entropy_(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """-log softmax(logits)[target] per row, [T] fp32; the logits [T, V] become its gradient by them."""
    rows, n = logits.shape
    nll = new_empty(rows)
    pointers = (logits.data_ptr(), nll.data_ptr(), targets.data_ptr())
    _kernel("cross_entropy", logits)(*pointers, rows, n, ignore, torch.get_num_threads())
    return nll


def scan_states(
    inflows: Tensor, entering: Tensor, decays: Tensor, starts: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """out[b] = state; state = decays[b] state + inflows[b], block after block of each piece, or from its last to first.

    inflows [g, H, ...], entering [m, H, ...] fp32 (the state that a piece begins with), decays [g, H] fp32, starts
    [m + 1] int64 (the block that each piece begins with, and g). Returns out, like inflows, and the m states at last.
    """
    out, ending = torch.empty_like(inflows), torch.empty_like(entering)
    (pieces, heads), size = entering.shape[:2], entering[0, 0].numel()
    pointers = (t.data_ptr() for t in (out, ending, inflows, entering, decays, starts))
    _kernel("scan_states", inflows)(*pointers, pieces, heads, size, backwards, torch.get_num_threads())
    return out, ending


def _kernel(name: str, tensor: Tensor):
    return getattr(load(), f"{name}_{SUFFIX[tensor.dtype]}")
