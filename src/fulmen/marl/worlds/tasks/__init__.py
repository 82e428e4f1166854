"""The tasks of the particle worlds: six of mpe2, equal to it, and two of our own."""

from fulmen.marl.worlds.tasks.adversary import Adversary
from fulmen.marl.worlds.tasks.base import Task
from fulmen.marl.worlds.tasks.memory import Memory
from fulmen.marl.worlds.tasks.navigation import Navigation
from fulmen.marl.worlds.tasks.push import Push
from fulmen.marl.worlds.tasks.reference import Reference
from fulmen.marl.worlds.tasks.speaker_listener import SpeakerListener
from fulmen.marl.worlds.tasks.spread import Spread
from fulmen.marl.worlds.tasks.tag import Tag

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Spread, Tag, Push, Reference, SpeakerListener, Adversary, Navigation, Memory)
}
"""Every task by its name."""

__all__ = ["TASKS", "Task"]
