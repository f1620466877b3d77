"""``vllm-steer fit concept``: a concept vector from answers with and without a concept."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.terminal import say

if TYPE_CHECKING:
    from vllm_steer.fit.concept import ConceptFit
    from vllm_steer.fit.relative_size import RelativeSize
    from vllm_steer.models import LanguageModel
    from vllm_steer.steers import VectorSteer
    from vllm_steer.texts.conversations import Conversation

_LONGEST: Final = 10_000
"""Maximum characters of a conversation that are printed."""


def concept(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    data: Annotated[
        Path,
        typer.Option(help="Rows of prompt, completion, label; or of messages, label."),
    ],
    labels: Annotated[str | None, typer.Option(help="Label map, such as 'good=1,bad=0'.")] = None,
    probe: Annotated[str, typer.Option(help="dim, logistic or pca.")] = "dim",
    site: Annotated[str, typer.Option(help="attn_in, attn_out or resid.")] = "attn_in",
    layers: options.Layers = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the k best layers, and ties.", show_default="all"),
    ] = None,
    select: Annotated[
        str, typer.Option(help="Accuracy that ranks the layers: train or validation.")
    ] = "train",
    signed: Annotated[
        bool, typer.Option("--signed", help="Orient each layer of a pca probe to label 1.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, callback=bounded, help="Tokens used of an answer.")
    ] = 16,
    max_length: Annotated[
        int, typer.Option(min=2, callback=bounded, help="Maximum tokens; the left is cut off.")
    ] = 1024,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template/--no-chat-template", help="Use the tokenizer's template."),
    ] = True,
    batch_size: options.BatchSize = 16,
    seed: Annotated[
        int, typer.Option(callback=bounded, help="Seed of the split and of the probe.")
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit a concept vector: a linear probe per layer, with its accuracy."""
    check_output(output, force, inputs=[data])
    check_named(model, description)
    layer_numbers = options.read_layers(layers)
    from vllm_steer.cli.progress import progress
    from vllm_steer.fit.activations import all_layers
    from vllm_steer.fit.concept import fit_concept
    from vllm_steer.fit.recipe import recipe
    from vllm_steer.texts.conversations import read_conversations

    conversations = read_conversations(data, labels=labels)
    language = options.open_model(model, dtype, device)
    _show_first(language, conversations[0], chat_template, max_tokens, max_length)
    count = len(layer_numbers or all_layers(language.model))
    with progress("reading answers", len(conversations)) as advance:
        concept_fit = fit_concept(
            language.model,
            language.tokenizer,
            conversations,
            probe=probe,  # type: ignore[arg-type]  # checked there
            site=site,  # type: ignore[arg-type]
            layers=layer_numbers,
            top_k=top_k,
            select=select,  # type: ignore[arg-type]
            signed=signed,
            max_tokens=max_tokens,
            max_length=max_length,
            chat_template=chat_template,
            batch_size=batch_size,
            seed=seed,
            folder=output.parent,
            on_answer=advance,
            on_layer=lambda done: advance(done, total=count, description="fitting layers"),
        )
    by_layer, figures = _by_layer(concept_fit), _figures(concept_fit)
    recipe_data = recipe(
        "concept",
        model=model,
        data=[data],
        settings=options.settings_of(context, ("data",)),
        figures={**figures, **{k: list(v.values()) for k, v in by_layer.items()}},
    )
    steer = options.write(
        concept_fit.steer,
        output,
        model=model,
        default_strength=default_strength,
        description=description,
        recipe=recipe_data,
    )
    size = _size(steer, language, conversations, chat_template)
    options.report(steer, output, by_layer, figures, as_json=as_json, size=size)


def _show_first(
    language: "LanguageModel",
    conversation: "Conversation",
    chat_template: bool,
    max_tokens: int,
    max_length: int,
) -> None:
    """Print the first row as the model reads it, and the tokens used of it, to stderr."""
    from vllm_steer.fit.answer_tokens import answer_tokens, render

    tokenizer = language.tokenizer
    rendered = render(tokenizer, conversation, chat_template=chat_template)
    encoded = answer_tokens(
        tokenizer,
        conversation,
        max_tokens=max_tokens,
        max_length=max_length,
        chat_template=chat_template,
    )
    counted = tokenizer.decode([encoded.ids[position] for position in encoded.kept])
    say(f"first row as the model reads it: {rendered.text!r}", stderr=True, longest=_LONGEST)
    say(
        f"tokens used of it: {counted!r} ({len(encoded.kept)} tokens)",
        stderr=True,
        longest=_LONGEST,
    )


def _size(
    steer: "VectorSteer",
    language: "LanguageModel",
    conversations: "Sequence[Conversation]",
    chat_template: bool,
) -> "RelativeSize":
    """How much the steer changes activations of the conversations."""
    from vllm_steer.fit.answer_tokens import render
    from vllm_steer.fit.relative_size import size_on_texts

    tokenizer = language.tokenizer
    texts = (render(tokenizer, one, chat_template=chat_template).text for one in conversations)
    return size_on_texts(language.model, tokenizer, steer, texts)


def _by_layer(concept_fit: "ConceptFit") -> dict[str, dict[int, float | None]]:
    return {
        "train_accuracy": {
            layer_probe.layer: layer_probe.train_accuracy for layer_probe in concept_fit.probes
        },
        "validation_accuracy": {
            layer_probe.layer: layer_probe.validation_accuracy for layer_probe in concept_fit.probes
        },
        "slope": {layer_probe.layer: layer_probe.probe.slope for layer_probe in concept_fit.probes},
        "intercept": {
            layer_probe.layer: layer_probe.probe.intercept for layer_probe in concept_fit.probes
        },
    }


def _figures(concept_fit: "ConceptFit") -> dict[str, Any]:
    return {
        "read_layers": [layer_probe.layer for layer_probe in concept_fit.probes],
        "train_answers": concept_fit.train_answers,
        "validation_answers": concept_fit.validation_answers,
        "train_tokens": concept_fit.train_tokens,
        "validation_tokens": concept_fit.validation_tokens,
    }
