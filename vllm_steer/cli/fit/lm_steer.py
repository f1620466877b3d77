"""``vllm-steer fit lm-steer``: an LM-Steer from labelled texts, or from two sets of texts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.fit import training_options as training
from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.progress import ProgressBarCallback, progress
from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.errors import SteerError
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
        Path | None,
        typer.Option(help="Labelled texts: .jsonl, .json, .csv, .tsv, or fastText .txt."),
    ] = None,
    positive: Annotated[
        Path | None, typer.Option(help="Texts of label 1; in .txt one per line.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts of label -1.")] = None,
    text_field: Annotated[str, typer.Option(help="Name of the text in a row.")] = "text",
    label_field: Annotated[str, typer.Option(help="Name of the label in a row.")] = "label",
    labels: Annotated[
        str | None,
        typer.Option(help="sst2, sst5, yelp, toxicity, '1:5', or pairs 'good=1,bad=-1'."),
    ] = None,
    variant: Annotated[str, typer.Option(help="multiply, add or offset.")] = "multiply",
    rank: Annotated[
        int, typer.Option(callback=bounded, help="Rank of the transform; multiply only.")
    ] = 1000,
    epsilon: Annotated[float, typer.Option(help="Factor of the change at strength 1.")] = 1e-3,
    initial_scale: Annotated[
        float, typer.Option(help="Standard deviation of initial projectors; multiply only.")
    ] = 1e-2,
    steps: Annotated[int, typer.Option(callback=bounded, help="Steps of Adam.")] = 1000,
    batch_size: Annotated[int, typer.Option(callback=bounded, help="Texts per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam, constant.")] = 1e-2,
    regularization: Annotated[
        float, typer.Option(help="Factor of the squared norm of the parameters.")
    ] = 0.0,
    max_length: Annotated[
        int, typer.Option(callback=bounded, help="Maximum tokens of a text.")
    ] = 256,
    dummy: Annotated[
        bool,
        typer.Option("--dummy/--no-dummy", help="Add a fixed column for what all texts share."),
    ] = True,
    train_on_padding: Annotated[
        bool,
        typer.Option("--train-on-padding", help="Loss on padding too, as in the authors' script."),
    ] = False,
    seed: Annotated[
        int, typer.Option(callback=bounded, help="Seed of the initial parameters and the order.")
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    run_folder: training.RunFolder = None,
    restart: training.Restart = False,
    checkpoint_every: training.CheckpointEvery = 100,
    cache_gib: Annotated[
        float, typer.Option(help="Disk for hidden states; the rest are recomputed.")
    ] = 16.0,
    plot: training.Plot = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Train an LM-Steer on texts with labels in [-1, 1]; an interrupted run resumes."""
    from vllm_steer.run_folder import locked
    from vllm_steer.steers.checks import check_default_strength

    check_output(output, force, inputs=[data, positive, negative])
    check_named(model, description)
    settings = _settings(context.params)
    if not 0 <= cache_gib < math.inf:
        raise SteerError(f"cache-gib is {cache_gib}; expected 0 or more")
    check_default_strength(default_strength)
    folder = training.checked_run_folder(run_folder, output, plot=plot, force=force)
    files, texts = _texts(data, positive, negative, text_field, label_field, labels)
    with locked(folder):
        with progress("loading the model") as advance:
            steer = _fit(context.params, settings, texts, folder, advance)
        recipe_data = {**(steer.recipe or {}), "model": model, "data": files}
        steer = replace(
            steer,
            base_model=model,
            description=description,
            default_strength=default_strength,
            recipe=recipe_data,
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
    """Name and SHA-256 of the files, and their labelled texts."""
    from vllm_steer.texts import read_labelled, read_two_sides

    if data is not None and positive is None and negative is None:
        files = [data]
        texts = read_labelled(data, text_field=text_field, label_field=label_field, labels=labels)
    elif data is None and positive is not None and negative is not None:
        files = [positive, negative]
        texts = read_two_sides(positive, negative, text_field=text_field)
    else:
        raise SteerError("give the texts as --data FILE, or as --positive FILE and --negative FILE")
    return [training.file_record(path) for path in files], texts


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The training settings among the options. Raises ``SteerError`` before a model is loaded."""
    from vllm_steer.fit.lm_steer_settings import LMSteerSettings

    values = {f.name: params[f.name] for f in fields(LMSteerSettings) if f.name in params}
    return asdict(LMSteerSettings(**values, mask_padding=not params["train_on_padding"]))


def _fit(
    params: Mapping[str, Any],
    settings: Mapping[str, Any],
    texts: "list[LabelledText]",
    folder: Path,
    advance: ProgressBarCallback,
) -> "LMSteer":
    from vllm_steer.fit.lm_steer import fit_lm_steer
    from vllm_steer.models import load_language_model

    language = load_language_model(params["model"], dtype=params["dtype"], device=params["device"])
    return fit_lm_steer(
        language.model,
        language.tokenizer,
        [text for text, _ in texts],
        [label for _, label in texts],
        **settings,
        cache_bytes=int(params["cache_gib"] * GIB),
        run_folder=folder,
        restart=params["restart"],
        checkpoint_every=params["checkpoint_every"],
        callbacks=training.callbacks(advance, settings["steps"], "reading the texts"),
    )


def _finish(steer: "LMSteer", output: Path, folder: Path, plot: bool) -> None:
    """Write the steer first, so that the run can be resumed until the file exists."""
    from vllm_steer.files import save_steer

    save_steer(steer, output)
    training.finish(folder, plot=plot)


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
    rows = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in summary.items()}
    Console().print(facts(str(output), rows))
