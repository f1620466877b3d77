"""``vllm-steer fit vector``: a steering vector from two sets of texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.errors import SteerError

if TYPE_CHECKING:
    from vllm_steer.fit.pairs import ContrastiveTexts
    from vllm_steer.fit.vector import Text


def vector(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    pairs: Annotated[
        Path | None, typer.Option(help="Rows of positive, negative and optionally prompt.")
    ] = None,
    positive: Annotated[Path | None, typer.Option(help="Texts of the positive side.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts of the negative side.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled texts: above 0 positive, below 0 negative.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Name of the text in a row.")] = "text",
    label_field: Annotated[str, typer.Option(help="Name of the label in a row.")] = "label",
    labels: Annotated[
        str | None, typer.Option(help="Label map, such as 'fr=1,en=-1,de=0' or '1:5'.")
    ] = None,
    method: Annotated[str, typer.Option(help="mean, pca (of pairs) or unit.")] = "mean",
    tokens: Annotated[
        str, typer.Option(help="Tokens to use: all, last or answer (those after the prompt).")
    ] = "all",
    site: Annotated[str, typer.Option(help="resid, attn_in or attn_out.")] = "resid",
    mode: Annotated[str, typer.Option(help="add, rotate, project or relative.")] = "add",
    layers: options.Layers = None,
    max_length: Annotated[
        int, typer.Option(min=1, callback=bounded, help="Maximum tokens of a text.")
    ] = 512,
    batch_size: options.BatchSize = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit a steering vector: the difference of activations on two sets of texts."""
    check_output(output, force, inputs=[pairs, positive, negative, data])
    check_named(model, description)
    layer_numbers = options.read_layers(layers)
    from vllm_steer.cli.progress import progress
    from vllm_steer.fit.recipe import recipe
    from vllm_steer.fit.relative_size import size_on_texts
    from vllm_steer.fit.vector import PASSES_OVER_TEXTS, fit_vector

    files = [file for file in (pairs, positive, negative, data) if file is not None]
    sides = _sides(pairs, positive, negative, data, text_field, label_field, labels)
    language = options.open_model(model, dtype, device)
    count = len(sides.positive) + len(sides.negative)
    with progress("reading texts", count * PASSES_OVER_TEXTS.get(method, 1)) as advance:  # type: ignore[call-overload]
        steer = fit_vector(
            language.model,
            language.tokenizer,
            sides.positive,
            sides.negative,
            layers=layer_numbers,
            site=site,  # type: ignore[arg-type]  # checked there
            mode=mode,  # type: ignore[arg-type]
            direction=method,  # type: ignore[arg-type]
            tokens=tokens,  # type: ignore[arg-type]
            batch_size=batch_size,
            max_length=max_length,
            folder=output.parent,
            on_text=advance,
        )
    norms = dict(zip(steer.layers, steer.vectors.double().norm(dim=1).tolist(), strict=True))
    figures = {"positive_texts": len(sides.positive), "negative_texts": len(sides.negative)}
    recipe_data = recipe(
        "vector",
        model=model,
        data=files,
        settings=options.settings_of(context, ("pairs", "positive", "negative", "data")),
        figures=figures,
    )
    steer = options.write(
        steer,
        output,
        model=model,
        default_strength=default_strength,
        description=description,
        recipe=recipe_data,
    )
    texts = [text if isinstance(text, str) else "".join(text) for text in _alternating(sides)]
    size = size_on_texts(language.model, language.tokenizer, steer, texts)
    options.report(steer, output, {"norm": norms}, figures, as_json=as_json, size=size)


def _alternating(sides: "ContrastiveTexts") -> "list[Text]":
    """Positive and negative texts in turn, as long as there are some of both."""
    return [text for pair in zip(sides.positive, sides.negative, strict=False) for text in pair]


def _sides(
    pairs: Path | None,
    positive: Path | None,
    negative: Path | None,
    data: Path | None,
    text_field: str,
    label_field: str,
    labels: str | None,
) -> "ContrastiveTexts":
    """The texts of the source that was given."""
    from vllm_steer.fit.pairs import read_pairs, sides_of
    from vllm_steer.texts import read_labelled, read_two_sides

    is_given = [source is not None for source in (pairs, positive, negative, data)]
    if is_given == [True, False, False, False] and pairs:
        return read_pairs(pairs)
    if is_given == [False, True, True, False] and positive and negative:
        return sides_of(read_two_sides(positive, negative, text_field=text_field))
    if is_given == [False, False, False, True] and data:
        return sides_of(
            read_labelled(data, text_field=text_field, label_field=label_field, labels=labels)
        )
    raise SteerError("give --pairs, or --positive and --negative, or --data, and only one of these")
