"""Which parameters train, and how it is said."""

import pytest
from torch import nn

from fulmen.config import UserError
from fulmen.train.freezing import describe_parts, freeze


@pytest.fixture
def model():
    return nn.ModuleDict({"tower": nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 1)]), "tower_two": nn.Linear(5, 1)})


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("prefixes", "left"),
    [
        (
            [],
            ["tower.0.weight", "tower.0.bias", "tower.1.weight", "tower.1.bias", "tower_two.weight", "tower_two.bias"],
        ),
        (["tower"], ["tower_two.weight", "tower_two.bias"]),
        (["tower.0", "tower_two.bias"], ["tower.1.weight", "tower.1.bias", "tower_two.weight"]),
    ],
)
def test_a_prefix_is_a_whole_part_of_a_name(model, prefixes, left):
    freeze(model, prefixes)
    assert trained(model) == left


@pytest.mark.parametrize("prefix", ["towe", "", "tower.2", "weight"])
def test_a_prefix_that_matches_nothing_is_refused(model, prefix):
    with pytest.raises(UserError, match=r"no parameter's name begins with '.*'; the parts are tower, tower_two$"):
        freeze(model, ["tower", prefix])


def test_something_must_train(model):
    with pytest.raises(UserError, match=r"^train\.freeze leaves nothing to train"):
        freeze(model, ["tower", "tower_two"])


def test_the_parts_are_counted(model):
    assert describe_parts(model) == "trained: tower 13, tower_two 6; frozen: nothing"
    freeze(model, ["tower.0", "tower_two"])
    assert describe_parts(model) == "trained: tower 4; frozen: tower 9, tower_two 6"
