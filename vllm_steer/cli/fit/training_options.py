"""Options and steps that the commands share whose fit is a training run in a run folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_output
from vllm_steer.cli.progress import ProgressBarCallback
from vllm_steer.cli.terminal import say

if TYPE_CHECKING:
    from vllm_steer.fit.lm_steer_settings import FitCallbacks

RunFolder = Annotated[
    Path | None, typer.Option(help="Checkpoints and loss curve; OUTPUT.run by default.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard an unfinished run in the run folder.")
]
CheckpointEvery = Annotated[int, typer.Option(callback=bounded, help="Steps between checkpoints.")]
Plot = Annotated[bool, typer.Option("--plot", help="Draw loss.png in the run folder.")]


def checked_run_folder(folder: Path | None, output: Path, *, plot: bool, force: bool) -> Path:
    """The run folder; ``SteerError`` if the plot cannot be drawn there."""
    from vllm_steer.fit.training_run import LOSS_PLOT
    from vllm_steer.optional import require_package

    folder = folder or output.with_name(output.name + ".run")
    if plot:
        require_package("matplotlib")
        if os.path.lexists(folder / LOSS_PLOT):
            check_output(folder / LOSS_PLOT, force)
    return folder


def callbacks(advance: ProgressBarCallback, steps: int, reading: str) -> "FitCallbacks":
    """Callbacks that show a fit of ``steps`` steps; ``reading`` says what it does with texts."""
    from vllm_steer.fit.lm_steer_settings import FitCallbacks

    return FitCallbacks(
        on_text=lambda done, total: advance(done, total=total, description=reading),
        on_step=lambda step, loss: advance(
            step + 1, total=steps, description=f"fitting, loss {loss:.3f}"
        ),
        on_message=lambda text: say(f"vllm-steer: {text}", stderr=True),
    )


def file_record(file: Path) -> dict[str, str]:
    """A file's name and SHA-256, for a recipe."""
    from vllm_steer.digest import file_digest
    from vllm_steer.untrusted_text import printable

    return {"file": printable(file.name), "sha256": file_digest(file)}


def finish(folder: Path, *, plot: bool) -> None:
    """After the steer is written: the loss curve is kept, checkpoints are removed."""
    from vllm_steer.fit.loss_plot import plot_losses
    from vllm_steer.fit.training_run import LOSS_PLOT, finish_run, read_losses

    if plot:
        plot_losses(read_losses(folder), folder / LOSS_PLOT)
    finish_run(folder)
