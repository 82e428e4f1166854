"""Teams of agents that learn, teach each other and remember: worlds, learners, PAT, its rivals, and how they compare.

`compare` and `evaluate` are functions of the modules of these names.

Letters in all files: W worlds, N agents, O and A the widest observation and action.
"""

from fulmen.marl.checkpoint import TrainedTeam, load_team
from fulmen.marl.compare import METHODS, Comparison, Method
from fulmen.marl.evaluate import Evaluation
from fulmen.marl.learner import LearnerSettings, TeamLearner
from fulmen.marl.memory import MemorySettings
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.render import render_episode
from fulmen.marl.run import MarlResult, train
from fulmen.marl.spec import Environment, TeamSpec, Transition
from fulmen.marl.team import Team, TeamSettings
from fulmen.marl.transfer import TRANSFERS, Transfer, make_transfer
from fulmen.marl.transfer.selector import load_selector, save_selector
from fulmen.marl.worlds import TASKS, make_environment
from fulmen.marl.worlds.pettingzoo import PettingZooEnvironment

__all__ = [
    "METHODS",
    "TASKS",
    "TRANSFERS",
    "Comparison",
    "Environment",
    "Evaluation",
    "LearnerSettings",
    "MarlRecipe",
    "MarlResult",
    "MemorySettings",
    "Method",
    "PettingZooEnvironment",
    "Team",
    "TeamLearner",
    "TeamSettings",
    "TeamSpec",
    "TrainedTeam",
    "Transfer",
    "Transition",
    "load_selector",
    "load_team",
    "make_environment",
    "make_transfer",
    "render_episode",
    "save_selector",
    "train",
]
