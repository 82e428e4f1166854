"""AdamW over two groups, and its state by parameter name, which is how snapshots keep it."""

from torch import Tensor, nn
from torch.optim import AdamW

from fulmen.train.recipe import OptimizerSection


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> AdamW:
    """AdamW with weight decay on matrices (embedding and head included) and none on the norms' vectors."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name:key`, for example `norm.weight:exp_avg`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.rsplit(":", 1)
        parameter = parameters[name]
        # The step counter stays where fused AdamW keeps it: on the parameter's device, in fp32.
        optimizer.state[parameter][key] = value.to(parameter.device).clone()
