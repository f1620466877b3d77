"""Plots the loss curve of a training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vllm_steer.picture import picture

_DECAY: Final = 0.95


def plot_losses(losses: Sequence[float], path: Path) -> None:
    """Write a PNG: each step's loss, and their mean that forgets a twentieth a step.

    Raises ``SteerError`` without matplotlib, and if the file cannot be written.
    """
    with picture(path, dpi=120, figsize=(7, 4), layout="constrained") as figure:
        axes = figure.add_subplot()
        axes.plot(losses, color="0.75", linewidth=0.8, label="step")
        axes.plot(_smooth(losses), label="mean")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend()


def _smooth(losses: Sequence[float]) -> list[float]:
    """The exponential mean, corrected for its start."""
    total, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        total, weight = _DECAY * total + loss, _DECAY * weight + 1
        smoothed.append(total / weight)
    return smoothed
