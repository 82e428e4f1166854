"""Which rank does what: two factorings of the same ranks, one for the experts and one for everything else.

    world = pp x dp x cp x tp          data, context and tensor parallelism within each stage of a pipeline
    world = pp x edp x etp x ep        of the experts: replicas, width and number (MiniMax-01, section 4.1)

The last dim of each runs over neighbouring ranks, which share a host's fast links.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fulmen.config import UserError

DENSE, EXPERTS = ("pp", "dp", "cp", "tp"), ("pp", "edp", "etp", "ep")


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Ranks along each axis; 0 for `dp` or `edp` is whatever the others leave.

    pp: stages of the pipeline. dp: replicas that read other data, over which weights are sharded (FSDP). cp: parts of a
    row of tokens. tp: parts of heads, of the vocabulary, and of a row's tokens between them. edp, etp, ep: replicas of
    the experts, parts of their width, and of their number.
    """

    pp: int = 1
    dp: int = 0
    cp: int = 1
    tp: int = 1
    edp: int = 0
    etp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in {*DENSE, *EXPERTS}:
            size, least = getattr(self, name), 0 if name in ("dp", "edp") else 1
            if size < least:
                raise UserError(f"mesh.{name} = {size} is no number of ranks: take {least} or more")

    def fitted(self, world: int) -> "MeshSizes":
        """The same with `dp` and `edp` filled in. Raises UserError, with both products, unless they are `world`."""
        dp = self.dp or max(1, world // math.prod((self.pp, self.cp, self.tp)))
        edp = self.edp or max(1, world // math.prod((self.pp, self.etp, self.ep)))
        whole = MeshSizes(pp=self.pp, dp=dp, cp=self.cp, tp=self.tp, edp=edp, etp=self.etp, ep=self.ep)
        for names in (DENSE, EXPERTS):
            sizes = [getattr(whole, name) for name in names]
            if math.prod(sizes) != world:
                product = " x ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
                raise UserError(
                    f"the mesh {product} is {math.prod(sizes)} ranks, and there are {world}: change mesh."
                    f"{', mesh.'.join(names)} or the number of ranks"
                )
        return whole


class Mesh:
    """The two meshes over all ranks of the default process group; every rank makes it at the same time.

    dense: dims pp, dp, cp, tp. experts: dims pp, edp, etp, ep. A group of size 1 costs no communication.
    """

    def __init__(self, sizes: MeshSizes, device_type: str):
        """Raises UserError unless the sizes multiply to the number of ranks."""
        self.sizes = sizes.fitted(dist.get_world_size())
        self.dense = self._init(DENSE, device_type)
        self.experts = self._init(EXPERTS, device_type)

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        kind = self.dense.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def group(self, axis: str) -> dist.ProcessGroup:
        """This rank's group along an axis of either mesh."""
        return (self.experts if axis in EXPERTS[1:] else self.dense).get_group(axis)

    def rank(self, axis: str) -> int:
        """This rank's place along it."""
        return dist.get_rank(self.group(axis))

    def members(self) -> dict[str, list[int]]:
        """The ranks of this rank's group along each axis of more than one."""
        groups = {name: self.group(name) for name in dict.fromkeys((*DENSE, *EXPERTS))}
        return {name: dist.get_process_group_ranks(group) for name, group in groups.items() if group.size() > 1}

    def _init(self, names: tuple[str, ...], device_type: str) -> DeviceMesh:
        return init_device_mesh(device_type, [getattr(self.sizes, name) for name in names], mesh_dim_names=names)
