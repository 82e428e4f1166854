"""Twenty steps of training over ranks against the same on one process: every loss and every parameter."""

import math

import pytest
import torch
from tests.parallel.ranks import run_ranks
from tests.train.small import RECIPE, make_text, make_trainer
from torch.distributed.tensor import DTensor

from fulmen.data import Tokenizer
from fulmen.parallel import Mesh, MeshSizes, World

STEPS = 20
# Rows of fixed sizes, so that they are the same on any mesh; three of them do not divide among replicas.
SETTINGS = ("schedule.batch_tokens=111", "schedule.micro_batch_tokens=37", "train.capacity_factor=0")


def trained(folder, sizes, keep_weights=False):
    """Of some steps the losses and gradient norms, and all parameters in the end; sizes None: one process."""
    text = make_text()
    world = None if sizes is None else World(Mesh(sizes, "cpu"))
    trainer = make_trainer(folder, text, Tokenizer.train([text], 300), SETTINGS, world, keep_weights)
    metrics = [trainer.train_step() for _ in range(STEPS)]
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }
    return [[step["loss"], step["grad_norm"]] for step in metrics], parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    (path / "recipe.toml").write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return trained(folder, None)


@pytest.mark.parametrize(
    "sizes",
    [
        {"dp": 2},
        {"dp": 3},
        {"cp": 4},
        {"tp": 2},
        {"pp": 2},
        {"dp": 4, "ep": 4},
        {"dp": 2, "etp": 2},
        {"dp": 4, "ep": 2, "etp": 2},
        {"cp": 2, "ep": 2},
        {"dp": 2, "cp": 2, "tp": 2, "ep": 4},
        {"dp": 2, "cp": 4, "ep": 2, "etp": 2},
        {"pp": 2, "cp": 2, "tp": 2, "ep": 2},
    ],
    ids=lambda sizes: " x ".join(f"{name} {size}" for name, size in sizes.items()),
)
def test_training_over_ranks_is_training(folder, alone, sizes):
    check_training(folder, alone, sizes)


@pytest.mark.parametrize(
    "sizes", [{"dp": 2}, {"cp": 2, "ep": 2}, {"pp": 2, "cp": 2}], ids=lambda sizes: " x ".join(sizes)
)
def test_with_weights_that_stay_gathered(folder, alone, sizes):
    check_training(folder, alone, sizes, keep_weights=True)


def check_training(folder, alone, sizes, keep_weights=False):
    curve, parameters = alone
    world = math.prod(size for name, size in sizes.items() if name in ("pp", "dp", "cp", "tp"))
    met = set()
    for found_curve, found in run_ranks(world, trained, folder, MeshSizes(**sizes), keep_weights):
        torch.testing.assert_close(torch.tensor(found_curve), torch.tensor(curve), rtol=1e-4, atol=1e-4)
        met |= set(found)
        for name, value in found.items():
            expected = parameters[name]
            torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4, msg=name)
    assert met == set(parameters)
