"""The one function that spreads a model over a mesh, in the order that its parts need."""

import warnings

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fulmen.model import LanguageModel
from fulmen.parallel.mesh import Mesh


def parallelize(model: LanguageModel, mesh: Mesh) -> None:
    """Spread a model, the same on every rank, over all ranks of the mesh, in place.

    FSDP2 comes last: it shards whatever a rank then holds, an expert's matrices over the experts' replicas (edp), all
    else over dp x cp, layer by layer, so that no rank ever holds more than one layer's weights whole. Gradients are
    sums over ranks, since each rank computes its share of one loss.
    """
    dense = mesh.dense["dp", "cp"]._flatten("dp_cp")
    for layer in model.layers:
        _shard(layer.block_sparse_moe.experts, mesh.experts["edp"])
        _shard(layer, dense)
    _shard(model, dense)
    register_fsdp_forward_method(model, "loss")


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    # A layer's output is a view of what its experts give; nobody here changes it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", module="torch.distributed.fsdp")
    fully_shard(module, mesh=mesh)
    assert isinstance(module, FSDPModule)
    # Plain sums, for which gloo has no scaled form either.
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)
