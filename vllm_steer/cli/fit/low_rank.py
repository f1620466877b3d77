"""``vllm-steer fit low-rank``: a low-rank map from prompts with answers, or from texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.fit import training_options as training
from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.progress import ProgressBarCallback, progress
from vllm_steer.cli.terminal import say
from vllm_steer.errors import SteerError

if TYPE_CHECKING:
    from vllm_steer.fit.scored_texts import StrengthText
    from vllm_steer.models import LanguageModel
    from vllm_steer.steers import LowRankSteer


def low_rank(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    data: Annotated[
        Path | None, typer.Option(help="Rows of prompt and completion: loss on the completion.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts: loss on all tokens.")] = None,
    prompt_field: Annotated[str, typer.Option(help="Name of the prompt in a row.")] = "prompt",
    answer_field: Annotated[str, typer.Option(help="Name of the answer in a row.")] = "completion",
    text_field: Annotated[str, typer.Option(help="Name of the text in a row of --texts.")] = "text",
    label_field: Annotated[
        str | None,
        typer.Option(help="Name of the strength of a row, in [-1, 1].", show_default="all 1"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Label map, such as 'formal=1,informal=-1' or '1:5'.")
    ] = None,
    parameterization: Annotated[str, typer.Option(help="loreft, direft or lm-steer.")] = "loreft",
    rank: Annotated[int, typer.Option(callback=bounded, help="Rank of each layer's map.")] = 4,
    layers: Annotated[
        str | None,
        typer.Option(help="0-based decoder blocks: '15', '8-31'.", show_default="the middle one"),
    ] = None,
    site: Annotated[str, typer.Option(help="resid, attn_in or attn_out.")] = "resid",
    phase: Annotated[
        str,
        typer.Option(
            help="Tokens that the map acts on: all, prompt, generation, answer, last, or windows "
            'as JSON: \'{"prompt": [":7", "-7:"]}\'.'
        ),
    ] = "all",
    steps: Annotated[int, typer.Option(callback=bounded, help="Steps of AdamW.")] = 200,
    batch_size: Annotated[int, typer.Option(callback=bounded, help="Texts per step.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate at the first step; it falls to zero.")
    ] = 4e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    valid_share: Annotated[
        float, typer.Option(help="Share of the texts that is held out; 0 for none.")
    ] = 0.1,
    max_length: Annotated[
        int, typer.Option(callback=bounded, help="Maximum tokens of a text; the end is cut off.")
    ] = 256,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="Read prompt and answer as messages of a chat."),
    ] = False,
    end_of_text: Annotated[
        bool,
        typer.Option(
            "--end-of-text/--no-end-of-text", help="Train the end-of-text token after answers."
        ),
    ] = True,
    seed: Annotated[
        int, typer.Option(callback=bounded, help="Seed of the map, the order and the split.")
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    run_folder: training.RunFolder = None,
    restart: training.Restart = False,
    checkpoint_every: training.CheckpointEvery = 100,
    plot: training.Plot = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a low-rank map (ReFT) to the answers of prompts; an interrupted run resumes."""
    check_output(output, force, inputs=[data, texts])
    check_named(model, description)
    settings = _settings(context.params)
    rows = _rows(context, data, texts)
    folder = training.checked_run_folder(run_folder, output, plot=plot, force=force)
    from vllm_steer.run_folder import locked
    from vllm_steer.steers.checks import check_default_strength

    check_default_strength(default_strength)
    with locked(folder):
        with progress("loading the model") as advance:
            language = options.open_model(model, dtype, device)
            fitted = _fit(language, context.params, settings, rows, folder, advance)
        recipe_data = _recipe(fitted, model, data or texts)
        steer = options.write(
            fitted,
            output,
            model=model,
            default_strength=default_strength,
            description=description,
            recipe=recipe_data,
        )
        training.finish(folder, plot=plot)
    _report(language, steer, output, rows, settings, as_json=as_json)


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the options. Raises ``SteerError`` before a model is loaded."""
    from dataclasses import fields

    from vllm_steer.files.json_text import read_json
    from vllm_steer.fit.low_rank_settings import LowRankSettings

    values = {f.name: params[f.name] for f in fields(LowRankSettings)}
    values["layers"] = options.read_layers(values["layers"])
    if values["phase"].lstrip().startswith("{"):
        values["phase"] = read_json(values["phase"], "--phase")
    LowRankSettings(**values)
    return values


def _rows(context: typer.Context, data: Path | None, texts: Path | None) -> "list[StrengthText]":
    """The rows of the source that was given."""
    from vllm_steer.fit.scored_texts import read_answers, read_plain

    names = {name: context.params[name] for name in ("label_field", "labels")}
    if data is not None and texts is None:
        options.reject_options(context, ("text_field",), "with --data")
        fields = {name: context.params[name] for name in ("prompt_field", "answer_field")}
        return read_answers(data, **fields, **names)
    if texts is not None and data is None:
        of_answers = ("prompt_field", "answer_field", "chat_template", "end_of_text", "phase")
        options.reject_options(context, of_answers, "with --texts, which have no prompts")
        return read_plain(texts, text_field=context.params["text_field"], **names)
    raise SteerError("give --data, prompts with answers, or --texts, and only one of these")


def _fit(
    language: "LanguageModel",
    params: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: "list[StrengthText]",
    folder: Path,
    advance: ProgressBarCallback,
) -> "LowRankSteer":
    from vllm_steer.fit.low_rank import fit_low_rank

    return fit_low_rank(
        language.model,
        language.tokenizer,
        [row.text for row in rows],
        [row.strength for row in rows],
        **settings,
        run_folder=folder,
        restart=params["restart"],
        checkpoint_every=params["checkpoint_every"],
        callbacks=training.callbacks(advance, settings["steps"], "reading held-out texts"),
    )


def _recipe(steer: "LowRankSteer", model: str, file: Path | None) -> dict[str, Any]:
    """The fit's recipe with the model's and the file's names."""
    assert file is not None
    return {**(steer.recipe or {}), "model": model, "data": [training.file_record(file)]}


def _report(
    language: "LanguageModel",
    steer: "LowRankSteer",
    output: Path,
    rows: "list[StrengthText]",
    settings: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    from vllm_steer.fit.relative_size import size_on_texts
    from vllm_steer.steers.properties import layer_norms

    joined = (row.text if isinstance(row.text, str) else "".join(row.text) for row in rows)
    size = size_on_texts(language.model, language.tokenizer, steer, joined)
    norms = dict(zip(steer.layers, layer_norms(steer).tolist(), strict=True))
    figures = dict((steer.recipe or {})["figures"])
    options.report(steer, output, {"norm": norms}, figures, as_json=as_json, size=size)
    if as_json:
        return
    before, after = figures["valid_loss_before"], figures["valid_loss_after"]
    if after is not None:
        at = "strength 1" if {row.strength for row in rows} == {1.0} else "their strengths"
        say(
            f"held-out loss per token: {before:.4g} without, {after:.4g} at {at} "
            f"({figures['valid_texts']} texts)"
        )
    if settings["phase"] != "all":
        from vllm_steer.files.json_text import json_text

        say(f'fitted to a phase, which requests give too: "phase": {json_text(settings["phase"])}')
