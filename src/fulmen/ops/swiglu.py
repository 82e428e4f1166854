"""SiLU(gate) * up, the activation of an expert, and its gradient; no autograd of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.ops import gpu
from fulmen.ops.cpu import training


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up of gate_up [R, 2F], the gates before the ups: [R, F]."""
    if gpu.serves(gate_up):
        return gpu.swiglu.swiglu(gate_up)
    if training.fuses(gate_up):
        return training.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(d_act: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of rows that count with weights [R, 1]; d_act [R, F] is the gradient of an unweighted row's activation.

    Returns d_gate_up [R, 2F], the weighted activations weights * act [R, F] and d_weights [R] fp32.
    """
    if gpu.serves(d_act, gate_up, weights):
        return gpu.swiglu.swiglu_backward(d_act, gate_up, weights)
    if training.fuses(d_act, gate_up, weights):
        return training.swiglu_backward(d_act, gate_up, weights)
    gate, up = gate_up.chunk(2, dim=-1)
    act_gate = F.silu(gate)
    act = act_gate * up
    d_weights = (d_act * act).sum(dim=-1, dtype=torch.float32)
    d_act = d_act * weights
    d_gate = torch.ops.aten.silu_backward(d_act * up, gate)
    return torch.cat((d_gate, d_act.mul_(act_gate)), dim=-1), act.mul_(weights), d_weights
