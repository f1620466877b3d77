"""``vllm-steer fit condition``: a condition on prompts from prompts of two kinds."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError
from vllm_steer.tables import Column, Table

if TYPE_CHECKING:
    from vllm_steer.fit.condition import ConditionFit, LayerThreshold
    from vllm_steer.fit.thresholds import Figures

_FEW: Final = 10
"""Prompts of a side below which the figures of those held out are rough."""


def condition(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    positive: Annotated[
        Path | None, typer.Option(help="Prompts on which the condition shall hold.")
    ] = None,
    negative: Annotated[
        Path | None, typer.Option(help="Prompts on which it shall not hold.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled prompts: above 0 positive, below 0 negative.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Name of the prompt in a row.")] = "text",
    label_field: Annotated[str, typer.Option(help="Name of the label in a row.")] = "label",
    labels: Annotated[
        str | None, typer.Option(help="Label map, such as 'harmful=1,harmless=-1'.")
    ] = None,
    layers: options.Layers = None,
    site: Annotated[str, typer.Option(help="resid, attn_in or attn_out.")] = "resid",
    tokens: Annotated[
        str, typer.Option(help="Read the last token of a prompt, or any of its tokens.")
    ] = "last",
    similarity: Annotated[str, typer.Option(help="cosine, dot or cast.")] = "cosine",
    direction: Annotated[str, typer.Option(help="mean, dim, logistic or pca.")] = "mean",
    valid_share: Annotated[
        float, typer.Option(help="Share of the prompts of each side that is held out.")
    ] = 0.3,
    seed: Annotated[
        int, typer.Option(callback=bounded, help="Seed of the split and of the direction.")
    ] = 0,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Read each prompt as a user's chat message.")
    ] = False,
    max_length: Annotated[
        int, typer.Option(min=1, callback=bounded, help="Maximum tokens; the left is cut off.")
    ] = 1024,
    batch_size: options.BatchSize = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    description: options.Description = "",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit a condition: the layer, direction and threshold that tell two kinds of prompts apart."""
    check_output(output, force, inputs=[positive, negative, data])
    check_named(model, description)
    layer_numbers = options.read_layers(layers)
    from vllm_steer.cli.progress import progress
    from vllm_steer.files import save_steer
    from vllm_steer.fit.condition import fit_condition
    from vllm_steer.fit.recipe import recipe
    from vllm_steer.models import EMBEDDED

    files = [file for file in (positive, negative, data) if file is not None]
    sides = _sides(positive, negative, data, text_field, label_field, labels)
    language = options.open_model(model, dtype, device)
    passes = 2 if tokens == "any" else 1
    with progress("reading prompts", passes * sum(map(len, sides))) as advance:
        fit = fit_condition(
            language.model,
            language.tokenizer,
            *sides,
            layers=layer_numbers,
            site=site,  # type: ignore[arg-type]  # checked there
            tokens=tokens,  # type: ignore[arg-type]
            similarity=similarity,  # type: ignore[arg-type]
            direction=direction,  # type: ignore[arg-type]
            valid_share=valid_share,
            seed=seed,
            chat_template=chat_template,
            batch_size=batch_size,
            max_length=max_length,
            folder=output.parent,
            on_prompt=advance,
        )
    figures = _figures(fit)
    steer = replace(
        fit.steer,
        base_model="vllm-steer/embedded" if model == EMBEDDED else model,
        description=description,
        recipe=recipe(
            "condition",
            model=model,
            data=files,
            settings=options.settings_of(context, ("positive", "negative", "data")),
            figures=figures,
        ),
    )
    save_steer(steer, output)
    _warn_of_few(fit.best.valid)
    _report(fit, output, figures, as_json=as_json)


def _sides(
    positive: Path | None,
    negative: Path | None,
    data: Path | None,
    text_field: str,
    label_field: str,
    labels: str | None,
) -> tuple[list[str], list[str]]:
    """The positive and the negative prompts of the source that was given."""
    from vllm_steer.texts import read_labelled, read_texts

    is_given = [source is not None for source in (positive, negative, data)]
    if is_given == [True, True, False] and positive and negative:
        return (
            list(read_texts(positive, text_field=text_field)),
            list(read_texts(negative, text_field=text_field)),
        )
    if is_given == [False, False, True] and data:
        rows = read_labelled(data, text_field=text_field, label_field=label_field, labels=labels)
        return [text for text, label in rows if label > 0], [t for t, label in rows if label < 0]
    raise SteerError("give --positive and --negative, or --data, and only one of these")


def _figures(fit: "ConditionFit") -> dict[str, Any]:
    """What was chosen, and how well it does, in plain data."""
    return {
        "layer": fit.steer.layers[0],
        "threshold": fit.steer.threshold,
        "side": fit.steer.side,
        "tokens": fit.steer.tokens,
        "train": fit.best.train.data,
        "valid": fit.best.valid.data,
    }


def _warn_of_few(valid: "Figures") -> None:
    if min(valid.positives, valid.negatives) < _FEW:
        say(
            f"held out are {valid.positives} positive and {valid.negatives} negative prompts: with "
            f"fewer than {_FEW} of a side the figures are rough",
            stderr=True,
        )


def _report(fit: "ConditionFit", output: Path, figures: dict[str, Any], *, as_json: bool) -> None:
    steer = fit.steer
    if as_json:
        by_layer = {str(one.layer): _layer_data(one) for one in fit.layers}
        summary = {"kind": steer.kind, "site": steer.site, "similarity": steer.similarity}
        say_json({"output": str(output), **summary, **figures, "by_layer": by_layer})
        return
    say(
        f"{output}: condition at {steer.site} of layer {steer.layers[0]}: {steer.similarity} "
        f"{steer.side} {steer.threshold:.5g} at {_WHERE[steer.tokens]}"
    )
    names = ("precision", "recall", "f1")
    columns = [Column("layer", "d"), Column("side"), Column("threshold", ".4g")]
    columns += [Column(f"{part} {name}", ".3f") for part in ("held-out", "train") for name in names]
    rows = [
        [
            one.layer,
            one.threshold.side,
            one.threshold.value,
            *(getattr(one.threshold.valid, name) for name in names),
            *(getattr(one.threshold.train, name) for name in names),
        ]
        for one in fit.layers
    ]
    Console().print(Table("", columns, rows))


_WHERE: Final = {"last": "the prompt's last token", "any": "any token of the prompt"}


def _layer_data(one: "LayerThreshold") -> dict[str, Any]:
    threshold = one.threshold
    return {
        "threshold": threshold.value,
        "side": threshold.side,
        "margin": threshold.margin,
        "train": threshold.train.data,
        "valid": threshold.valid.data,
    }
