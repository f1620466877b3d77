"""The folder of a training run: what is needed to go on after the process has ended.

``checkpoint.safetensors`` holds the parameters and Adam's moments, and in its metadata the step and
what the run was started with; ``loss.csv`` the loss of each step. Both are replaced whole, the
checkpoint last, so that whatever ends the process they belong together up to the checkpoint's step.
"""

import csv
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.atomic_write import write_atomically, write_text
from vllm_steer.files.safetensors_writer import write_safetensors
from vllm_steer.run_folder import RunFiles, prepare
from vllm_steer.untrusted_text import shown

CHECKPOINT: Final = "checkpoint.safetensors"
LOSSES: Final = "loss.csv"
HIDDEN_STATES: Final = "hidden_states.bin"
LOSS_PLOT: Final = "loss.png"
_CHECKPOINT_SECONDS: Final = 60.0
_FINGERPRINT_VALUES: Final = 1 << 16
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_FILES: Final = RunFiles(work=(CHECKPOINT, HIDDEN_STATES), persistent=(LOSSES, LOSS_PLOT))


@dataclass
class TrainingState:
    """Where a training stands; the parameters are changed in place by the optimizer."""

    parameters: Mapping[str, torch.Tensor]
    optimizer: torch.optim.Adam
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)


@dataclass
class Checkpoints:
    """A folder, the settings of its run (plain data), and when checkpoints are due."""

    folder: Path
    settings: dict[str, Any]
    every: int = 100  # steps
    restart: bool = False
    written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SteerError(f"checkpoint_every is {self.every}; expected at least 1 step")

    def keep(self, training: TrainingState, *, last: bool) -> None:
        """Write a checkpoint if one is due: after so many steps, a minute, or the last step."""
        late = time.monotonic() - self.written > _CHECKPOINT_SECONDS
        if last or late or training.step % self.every == 0:
            self.write(training)
            self.written = time.monotonic()

    def write(self, training: TrainingState) -> None:
        """Write where the training stands; ``SteerError`` if that fails, with the last one kept."""
        write_losses(self.folder, training.losses)
        tensors = dict(training.parameters)
        for name, parameter in training.parameters.items():
            state = training.optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS if state}
        metadata = {"step": str(training.step), "settings": json.dumps(self.settings)}
        path = self.folder / CHECKPOINT
        write_atomically(path, lambda file: write_safetensors(file, tensors, metadata))


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    settings: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    losses: list[float]


def start_training(parameters: Mapping[str, torch.Tensor], learning_rate: float) -> TrainingState:
    """Adam without weight decay, before its first step."""
    # Not fused: on a CPU that reads a gradient of other strides than its parameter's wrongly.
    adam = torch.optim.Adam(list(parameters.values()), lr=learning_rate, fused=False)
    return TrainingState(parameters, adam)


def digest(texts: Sequence[str], labels: Sequence[float]) -> str:
    """SHA-256 of labelled texts in their order."""
    sha256 = hashlib.sha256()
    for text, label in zip(texts, labels, strict=True):
        sha256.update(json.dumps([text, float(label)]).encode())
    return sha256.hexdigest()


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a weight's shape and of its first values: another model has another."""
    first = weight.detach().flatten()[:_FINGERPRINT_VALUES].double().cpu().numpy()
    return hashlib.sha256(str(tuple(weight.shape)).encode() + first.tobytes()).hexdigest()


def resume(run: Checkpoints, training: TrainingState) -> None:
    """Bring ``training`` to where the run's checkpoint stands, or begin it in its folder.

    Raises ``SteerError`` naming each setting of the checkpoint that is another now, and for a
    folder that cannot be written to.
    """
    checkpoint = None if run.restart else _read_checkpoint(run.folder, training)
    prepare(run.folder, _FILES, run.settings, None if checkpoint is None else checkpoint.settings)
    if checkpoint is None:
        run.write(training)
    else:
        _restore(training, checkpoint)


def write_losses(folder: Path, losses: Sequence[float]) -> None:
    """The loss curve as CSV: step, loss."""
    lines = [f"{step},{loss!r}\n" for step, loss in enumerate(losses)]
    write_text(folder / LOSSES, "step,loss\n" + "".join(lines))


def read_losses(folder: Path) -> list[float]:
    """The loss of each step in the run's loss curve."""
    with (folder / LOSSES).open(encoding="utf-8", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def finish_run(folder: Path) -> None:
    """Leave the loss curve only."""
    _FILES.discard(folder)


def _read_checkpoint(folder: Path, training: TrainingState) -> _Checkpoint | None:
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings, step = json.loads(metadata["settings"]), int(metadata["step"])
        _check_tensors(training, tensors, settings, step)
        return _Checkpoint(path, settings, tensors, _losses_until(folder, step))
    except Exception as error:  # of safetensors, of JSON, of the disk
        raise SteerError(
            f"{path}: cannot be read ({cause(error)}); give --restart (restart=True) to begin anew"
        ) from error


def _restore(training: TrainingState, checkpoint: _Checkpoint) -> None:
    training.losses[:] = checkpoint.losses
    for name, parameter in training.parameters.items():
        saved = checkpoint.tensors[name]
        if saved.shape != parameter.shape:
            raise SteerError(f"{checkpoint.path}: {name} is {shown(saved)}; give --restart")
        parameter.data.copy_(saved)
        if checkpoint.losses:
            moments = {m: checkpoint.tensors[f"{name}.{m}"].to(parameter.device) for m in _MOMENTS}
            step = torch.tensor(float(training.step), device=parameter.device)
            training.optimizer.state[parameter] = {"step": step, **moments}


def _check_tensors(
    training: TrainingState, tensors: Mapping[str, torch.Tensor], settings: Any, step: int
) -> None:
    """Raise ``ValueError`` for what no checkpoint of this training can hold.

    Other settings are told apart later, by name: with them the tensors may well have other shapes.
    """
    if not isinstance(settings, dict):
        raise ValueError("its settings are no JSON object")
    moments = _MOMENTS if step else ()
    for name in training.parameters:
        shapes = {tensors[key].shape for key in (name, *(f"{name}.{m}" for m in moments))}
        if len(shapes) != 1:
            raise ValueError(f"the moments of {name} have other shapes than it has")


def _losses_until(folder: Path, step: int) -> list[float]:
    losses = read_losses(folder)
    if len(losses) < step:
        raise ValueError(f"{LOSSES} ends at step {len(losses)}, before the checkpoint's {step}")
    return losses[:step]
