"""What any run leaves on disk and how it resumes: its folder, metrics, progress, snapshots and plots.

The room knows nothing of models: a run is steps that go by, tensors by name and a state that JSON holds.
"""

from fulmen.run.directory import RunDirectory, choose_snapshot, only_if_begun
from fulmen.run.files import write_atomic
from fulmen.run.memory import keep_freed_memory
from fulmen.run.metrics import MetricsLog, read_metrics
from fulmen.run.plots import plot_curves
from fulmen.run.progress import Progress
from fulmen.run.signals import StopRequest
from fulmen.run.snapshot import Snapshot, SnapshotError, SnapshotStore

__all__ = [
    "MetricsLog",
    "Progress",
    "RunDirectory",
    "Snapshot",
    "SnapshotError",
    "SnapshotStore",
    "StopRequest",
    "choose_snapshot",
    "keep_freed_memory",
    "only_if_begun",
    "plot_curves",
    "read_metrics",
    "write_atomic",
]
