"""All that knows a rank: the mesh, context parallelism (LASP+, ring attention), experts spread over ranks.

Ops, model and data know of no rank. What computes over several takes plain tensors and process groups.
"""

from fulmen.parallel.cut import Cut
from fulmen.parallel.mesh import Mesh, MeshSizes
from fulmen.parallel.world import LostRankError, SharedError, World, is_first_rank, joined, restarts

__all__ = ["Cut", "LostRankError", "Mesh", "MeshSizes", "SharedError", "World", "is_first_rank", "joined", "restarts"]
