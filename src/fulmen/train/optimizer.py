"""AdamW over two groups, and its state by parameter name, which is how snapshots keep it."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fulmen.parallel.gradients import by_mesh
from fulmen.train.recipe import OptimizerSection


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> AdamW:
    """AdamW with weight decay on matrices (embedding and head included) and none on the norms' vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": group, "weight_decay": decay}
        for parameters, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        for group in by_mesh(parameters)
    ]
    betas = (settings.beta1, settings.beta2)
    return AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)


def begin_state(optimizer: AdamW) -> None:
    """Make the state that the first step would make, so that a snapshot can fill it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}


def optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name:key`, for example `norm.weight:exp_avg`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
