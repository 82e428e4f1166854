"""Pictures of a run: its learning curves, who attended to whom, and an episode of its team as a GIF."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulmen.config import UserError
from fulmen.marl.checkpoint import load_team
from fulmen.marl.evaluate import rollout
from fulmen.marl.plots import plot_attention, plot_attention_course, plot_returns, plot_student_share
from fulmen.marl.transfer.base import Transfer
from fulmen.marl.worlds.drawing import Overlay, draw, fit, save_gif
from fulmen.run import RunDirectory, read_metrics

LAST = 0.2
"""The share of a run, at its end, whose attention is averaged for the picture between agents."""

FPS = 10
"""Steps a second of an episode's film: those of mpe2's time."""


def draw_curves(directory: RunDirectory, agents: Sequence[str]) -> tuple[Path, ...]:
    """Draw what the run's metrics tell of its `agents` into its folder of plots; gives back the files."""
    metrics, name = read_metrics(directory.metrics), directory.path.name
    evaluations = [line for line in metrics if "own_return" in line]
    reports = [line for line in metrics if "returns" in line and "attention" in line]
    drawn = [directory.plots / "returns.png"]
    series = {"own policies": _curve(evaluations, "own_return")}
    if reports:
        series |= {"acting with transfer": _curve(evaluations, "pat_return")}
    plot_returns(drawn[0], {"": series}, title=f"{name}: return of an episode", highlight="acting with transfer")
    if reports:
        drawn.append(directory.plots / "student-share.png")
        plot_student_share(drawn[1], {"all agents": _curve(reports, "student_share")}, title=f"{name}: student share")
        drawn += _draw_attention(directory, reports, agents)
    return tuple(drawn)


def render_episode(path: str | Path, *, seed: int = 0, own: bool = False, out: str | Path | None = None) -> Path:
    """Draw an episode of the team that the run in `path` trained: a GIF, by default in the run's folder of plots.

    The team acts on the CPU and without noise, as it has learned to; with `own`, by the agents' own policies only.
    Raises `UserError` for a folder without a team, a world that cannot be drawn, a seed or file that cannot be.
    """
    out = RunDirectory(path).plots / "episode.gif" if out is None else Path(out)
    if out.suffix.lower() != ".gif":
        raise UserError(f"an episode is drawn as a GIF: {out} must end in .gif")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be at least 0 and below 2**63, got {seed}")
    with load_team(path, device="cpu") as team:
        frames = rollout(team.world, team.learner, Transfer(team.learner) if own else team.transfer, seed)
    extent = fit([frame.scene for frame in frames])
    pictures = [
        draw(
            frame.scene,
            title=f"{RunDirectory(path).path.name}: step {step}",
            overlay=None if frame.attention is None else Overlay(frame.student, frame.attention),
            extent=extent,
        )
        for step, frame in enumerate(frames)
    ]
    save_gif(pictures, out, FPS)
    return out


def _curve(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """frames [P] and means over the agents [1, P]."""
    return np.array([line["frames"] for line in lines]), np.array([[np.mean(line[key]) for line in lines]])


def _draw_attention(directory: RunDirectory, reports: list[dict[str, Any]], agents: Sequence[str]) -> list[Path]:
    frames = np.array([line["frames"] for line in reports])
    weights = np.array([line["attention"] for line in reports], float)
    last = max(1, round(LAST * len(weights)))
    drawn = [directory.plots / "attention.png", directory.plots / "attention-course.png"]
    title = f"{directory.path.name}: attention of students on teachers"
    plot_attention(drawn[0], weights[-last:].mean(0), title=title, agents=agents)
    plot_attention_course(drawn[1], frames, weights, title=title, agents=agents)
    return drawn
