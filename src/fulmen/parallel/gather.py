"""The weights of a model that is spread, whole again on the first rank: one after the other."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fulmen.checkpoint.names import Model
from fulmen.model import LanguageModel, VisionLanguageModel
from fulmen.parallel.mesh import Mesh


class GatheredWeights:
    """Gathers each parameter for the first rank; all ranks make it, and all go through `take` or `take_rest`."""

    def __init__(self, model: Model, mesh: Mesh):
        # FSDP has made the model's own class another.
        kind = VisionLanguageModel if isinstance(model, VisionLanguageModel) else LanguageModel
        with torch.device("meta"):
            self.described = kind(model.config)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the last forward pass has left gathered
        self._own: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._group, self._device = mesh.group("pp"), mesh.device
        # Of each stage those ranks talk to the first stage's that have the same place in it: one of them to rank 0.
        self._is_asked = dist.get_process_group_ranks(self._group)[0] == 0
        stages = [None] * self._group.size()
        dist.all_gather_object(stages, list(self._own), group=self._group)
        self._stage_of = {name: stage for stage, names in enumerate(stages) for name in names}
        self._left = [name for name, _ in self.described.named_parameters()]

    def take(self, name: str) -> Tensor:
        """The next parameter, on the CPU; on other ranks than the first one whatever is here of it."""
        if name != self._left[0]:
            raise ValueError(f"the next parameter is {self._left[0]}, not {name}")
        self._left.pop(0)
        stage, shape = self._stage_of[name], self.described.get_parameter(name).shape
        whole = self._own[name].full_tensor().detach().reshape(shape) if name in self._own else None
        if stage == 0 or not self._is_asked:
            return torch.empty(0) if whole is None else whole.cpu()
        if whole is not None:
            dist.send(whole.contiguous(), dist.get_global_rank(self._group, 0), self._group)
        elif dist.get_rank(self._group) == 0:
            whole = torch.empty(shape, device=self._device)
            dist.recv(whole, dist.get_global_rank(self._group, stage), self._group)
        return torch.empty(0) if whole is None else whole.cpu()

    def take_rest(self) -> None:
        """Take part in what is left, also where nobody wants it any more."""
        while self._left:
            self.take(self._left[0])
