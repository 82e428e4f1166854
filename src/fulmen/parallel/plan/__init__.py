"""What training and serving need of a machine, and how long they take, before anything is rented.

machines   GPUs by their numbers
job        what is trained, on which mesh: what falls to a rank
traffic    every collective of a step
memory     what a rank holds
timing     how long a step takes, and what hides what
training   all that as one plan; `find` looks for the best
serving    the same of a model that answers
"""

from fulmen.parallel.plan.find import Found, find_plan
from fulmen.parallel.plan.job import Job, Placement
from fulmen.parallel.plan.machines import MACHINES, Machine, read_machine
from fulmen.parallel.plan.serving import Serving
from fulmen.parallel.plan.training import Plan

__all__ = ["MACHINES", "Found", "Job", "Machine", "Placement", "Plan", "Serving", "find_plan", "read_machine"]
