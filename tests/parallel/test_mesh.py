"""Sizes of a mesh: what is left open is filled in, and both products are checked."""

import pytest

from fulmen.config import UserError
from fulmen.parallel import MeshSizes


def test_what_is_left_open_is_what_the_others_leave():
    sizes = MeshSizes(pp=2, cp=2, tp=2, ep=4).fitted(32)
    assert (sizes.dp, sizes.edp) == (4, 4)
    assert MeshSizes().fitted(1) == MeshSizes(dp=1, edp=1)
    assert MeshSizes(dp=3, edp=3).fitted(3).dp == 3


def test_both_products_are_checked():
    with pytest.raises(
        UserError, match=r"pp 1 x dp 2 x cp 2 x tp 1 is 4 ranks, and there are 6: change mesh.pp, mesh.dp"
    ):
        MeshSizes(dp=2, cp=2).fitted(6)
    with pytest.raises(
        UserError, match=r"pp 1 x edp 1 x etp 4 x ep 1 is 4 ranks, and there are 6: .* mesh.edp, mesh.etp"
    ):
        MeshSizes(etp=4).fitted(6)


@pytest.mark.parametrize(("name", "size", "least"), [("cp", 0, 1), ("dp", -1, 0), ("edp", -2, 0), ("ep", 0, 1)])
def test_what_is_no_number_of_ranks_is_refused(name, size, least):
    with pytest.raises(UserError, match=rf"mesh.{name} = {size} is no number of ranks: take {least} or more"):
        MeshSizes(**{name: size})
