"""``vllm-steer fit lm-steer``: an LM-Steer from labelled texts, or from two sets of texts."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.numbers import MOST
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.progress import Advance, progress
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError
from vllm_steer.run_folder import locked
from vllm_steer.tables import facts

if TYPE_CHECKING:
    from vllm_steer.steers import LMSteer
    from vllm_steer.texts import LabelledText

GIB = 1 << 30


def lm_steer(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    data: Annotated[
        Path | None, typer.Option(help="Labelled texts: .jsonl, .json, .csv or .tsv.")
    ] = None,
    positive: Annotated[Path | None, typer.Option(help="Texts of label 1; .txt: a line.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts of label -1.")] = None,
    text_field: Annotated[str, typer.Option(help="Name of the text in a row.")] = "text",
    label_field: Annotated[str, typer.Option(help="Name of the label in a row.")] = "label",
    labels: Annotated[
        str | None, typer.Option(help="sst2, sst5, yelp, toxicity, or pairs 'good=1,bad=-1'.")
    ] = None,
    variant: Annotated[str, typer.Option(help="multiply, add or offset.")] = "multiply",
    rank: Annotated[
        int, typer.Option(max=MOST, help="Rank of the transform; multiply only.")
    ] = 1000,
    epsilon: Annotated[float, typer.Option(help="Factor of the change at strength 1.")] = 1e-3,
    initial_scale: Annotated[
        float, typer.Option(help="Deviation of the first projectors; multiply only.")
    ] = 1e-2,
    steps: Annotated[int, typer.Option(max=MOST, help="Steps of Adam.")] = 1000,
    batch_size: Annotated[int, typer.Option(max=MOST, help="Texts per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, without a schedule.")] = 1e-2,
    regularization: Annotated[
        float, typer.Option(help="Factor of the sum of the parameters' squares.")
    ] = 0.0,
    max_length: Annotated[
        int, typer.Option(max=MOST, help="Tokens of a text that are read.")
    ] = 256,
    dummy: Annotated[
        bool, typer.Option("--dummy/--no-dummy", help="A column for what all texts share.")
    ] = True,
    train_on_padding: Annotated[
        bool, typer.Option("--train-on-padding", help="As the authors' script does.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=-MOST, max=MOST, help="Of the first parameters and of the order.")
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    run_folder: Annotated[
        Path | None, typer.Option(help="Checkpoints and loss curve; OUTPUT.run by default.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run in the run folder.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(max=MOST, help="Steps from checkpoint to checkpoint.")
    ] = 100,
    cache_gib: Annotated[
        float, typer.Option(help="Disk for the hidden states; more are computed each time.")
    ] = 16.0,
    plot: Annotated[bool, typer.Option("--plot", help="Draw loss.png in the run folder.")] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Train an LM-Steer on texts with labels in [-1, 1]; a killed run goes on where it was."""
    from vllm_steer.fit.training_run import LOSS_PLOT
    from vllm_steer.steers.checks import check_default_strength

    check_output(output, force, inputs=[data, positive, negative])
    check_named(model, description)
    settings = _settings(context.params)
    if not 0 <= cache_gib < math.inf:
        raise SteerError(f"cache-gib is {cache_gib}; expected 0 or more")
    check_default_strength(default_strength)
    if plot:
        from vllm_steer.optional import require_package

        require_package("matplotlib")
    files, found = _texts(data, positive, negative, text_field, label_field, labels)
    folder = run_folder or output.with_name(output.name + ".run")
    if plot and os.path.lexists(folder / LOSS_PLOT):
        check_output(folder / LOSS_PLOT, force)
    with locked(folder):
        with progress("loading the model") as advance:
            steer = _fit(context.params, settings, found, folder, advance)
        made = {**(steer.recipe or {}), "model": model, "data": files}
        steer = replace(
            steer,
            base_model=model,
            description=description,
            default_strength=default_strength,
            recipe=made,
        )
        _finish(steer, output, folder, plot)
    _print(steer, output, folder, as_json)


def _texts(
    data: Path | None,
    positive: Path | None,
    negative: Path | None,
    text_field: str,
    label_field: str,
    labels: str | None,
) -> tuple[list[dict[str, str]], "list[LabelledText]"]:
    """The files by name and SHA-256, and what is in them."""
    from vllm_steer.digest import file_digest
    from vllm_steer.texts import read_labelled, read_two_sides
    from vllm_steer.untrusted_text import printable

    if data is not None and positive is None and negative is None:
        files = [data]
        found = read_labelled(data, text_field=text_field, label_field=label_field, labels=labels)
    elif data is None and positive is not None and negative is not None:
        files = [positive, negative]
        found = read_two_sides(positive, negative, text_field=text_field)
    else:
        raise SteerError("give the texts as --data FILE, or as --positive FILE and --negative FILE")
    return [{"file": printable(path.name), "sha256": file_digest(path)} for path in files], found


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the options; refuses a bad one before a model is loaded."""
    from vllm_steer.fit.lm_steer_settings import LMSteerSettings

    named = {f.name: given[f.name] for f in fields(LMSteerSettings) if f.name in given}
    return asdict(LMSteerSettings(**named, mask_padding=not given["train_on_padding"]))


def _fit(
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
    texts: "list[LabelledText]",
    folder: Path,
    advance: Advance,
) -> "LMSteer":
    from vllm_steer.fit.lm_steer import fit_lm_steer
    from vllm_steer.fit.lm_steer_settings import FitCallbacks
    from vllm_steer.models import load_language_model

    loaded = load_language_model(given["model"], dtype=given["dtype"], device=given["device"])
    steps = settings["steps"]
    watch = FitCallbacks(
        on_text=lambda done, total: advance(done, total=total, said="reading the texts"),
        on_step=lambda step, loss: advance(step + 1, total=steps, said=f"fitting, loss {loss:.3f}"),
        on_message=lambda text: say(f"vllm-steer: {text}", stderr=True),
    )
    return fit_lm_steer(
        loaded.model,
        loaded.tokenizer,
        [text for text, _ in texts],
        [label for _, label in texts],
        **settings,
        cache_bytes=int(given["cache_gib"] * GIB),
        run_folder=folder,
        restart=given["restart"],
        checkpoint_every=given["checkpoint_every"],
        callbacks=watch,
    )


def _finish(steer: "LMSteer", output: Path, folder: Path, plot: bool) -> None:
    """The steer first: until it is written the run can be gone on with."""
    from vllm_steer.files import save_steer
    from vllm_steer.fit.loss_plot import plot_losses
    from vllm_steer.fit.training_run import LOSS_PLOT, finish_run, read_losses

    save_steer(steer, output)
    if plot:
        plot_losses(read_losses(folder), folder / LOSS_PLOT)
    finish_run(folder)


def _print(steer: "LMSteer", output: Path, folder: Path, as_json: bool) -> None:
    figures = (steer.recipe or {})["figures"]
    summary = {
        "output": str(output),
        "run_folder": str(folder),
        "variant": steer.variant,
        "rank": steer.rank,
        "epsilon": steer.epsilon,
        **figures,
    }
    if as_json:
        say_json(summary)
        return
    del summary["output"]
    shown = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in summary.items()}
    Console().print(facts(str(output), shown))
