"""The norm of gradients that are spread over ranks, and clipping by it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients laid end to end, whole ones where they are sharded; the same on every rank."""
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in by_mesh(parameters)]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale the gradients, whose norm is `norm`, so that it is at most `largest`."""
    for group in by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, largest, norm)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in groups that one call can take: those sharded over the same mesh, and those that are whole."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())
