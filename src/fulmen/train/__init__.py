"""Training: the recipe's sections, schedules, optimizer, objectives, the loop, a run from recipe to checkpoint."""

from fulmen.train.recipe import TrainRecipe
from fulmen.train.run import train
from fulmen.train.trainer import Trainer, TrainingDivergedError

__all__ = ["TrainRecipe", "Trainer", "TrainingDivergedError", "train"]
