"""``vllm-steer fit concept``: a concept vector from answers with and without the concept."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.numbers import MOST
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.terminal import say

if TYPE_CHECKING:
    from vllm_steer.fit.concept import ConceptFit
    from vllm_steer.models import LanguageModel
    from vllm_steer.texts.conversations import Conversation

_LONGEST: Final = 10_000
"""Characters of a conversation that are shown."""


def concept(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    data: Annotated[
        Path,
        typer.Option(help="Rows of prompt, completion, label; or of messages, label."),
    ],
    labels: Annotated[
        str | None, typer.Option(help="What the labels mean: 'good=1,bad=0'.")
    ] = None,
    probe: Annotated[str, typer.Option(help="dim, logistic or pca.")] = "dim",
    site: Annotated[str, typer.Option(help="attn_in, attn_out or resid.")] = "attn_in",
    layers: options.Layers = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the best layers; equal ones too.", show_default="all"),
    ] = None,
    select: Annotated[
        str, typer.Option(help="What they are best by: train or validation accuracy.")
    ] = "train",
    signed: Annotated[
        bool, typer.Option("--signed", help="Turn each layer of a pca probe towards label 1.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens taken of an answer.")
    ] = 16,
    max_length: Annotated[
        int, typer.Option(min=2, max=MOST, help="Tokens of a conversation, cut off on the left.")
    ] = 1024,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template/--no-chat-template", help="Use the tokenizer's template."),
    ] = True,
    batch_size: options.BatchSize = 16,
    seed: Annotated[
        int, typer.Option(min=-MOST, max=MOST, help="Of the split and of the probe.")
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit a concept vector: a probe per layer, and how well it tells the answers apart."""
    check_output(output, force, inputs=[data])
    check_named(model, description)
    wanted = options.read_layers(layers)
    from vllm_steer.cli.progress import progress
    from vllm_steer.fit.activations import all_layers
    from vllm_steer.fit.concept import fit_concept
    from vllm_steer.fit.recipe import recipe
    from vllm_steer.texts.conversations import read_conversations

    conversations = read_conversations(data, labels=labels)
    language = options.open_model(model, dtype, device)
    _show_first(language, conversations[0], chat_template, max_tokens, max_length)
    count = len(wanted or all_layers(language.model))
    with progress("reading answers", len(conversations)) as advance:
        found = fit_concept(
            language.model,
            language.tokenizer,
            conversations,
            probe=probe,  # type: ignore[arg-type]  # checked there
            site=site,  # type: ignore[arg-type]
            layers=wanted,
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
            on_layer=lambda done: advance(done, total=count, said="fitting layers"),
        )
    by_layer, figures = _by_layer(found), _figures(found)
    made = recipe(
        "concept",
        model=model,
        data=[data],
        settings=options.settings_of(context, ("data",)),
        figures={**figures, **{k: list(v.values()) for k, v in by_layer.items()}},
    )
    steer = options.write(
        found.steer,
        output,
        model=model,
        default_strength=default_strength,
        description=description,
        recipe=made,
    )
    options.report(steer, output, by_layer, figures, as_json=as_json)


def _show_first(
    language: "LanguageModel",
    conversation: "Conversation",
    chat_template: bool,
    max_tokens: int,
    max_length: int,
) -> None:
    """What the model reads of the first row, and the tokens of it that count, on stderr."""
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
        f"what counts of it: {counted!r} ({len(encoded.kept)} tokens)",
        stderr=True,
        longest=_LONGEST,
    )


def _by_layer(found: "ConceptFit") -> dict[str, dict[int, float | None]]:
    return {
        "train_accuracy": {one.layer: one.train_accuracy for one in found.probes},
        "validation_accuracy": {one.layer: one.validation_accuracy for one in found.probes},
        "slope": {one.layer: one.probe.slope for one in found.probes},
        "intercept": {one.layer: one.probe.intercept for one in found.probes},
    }


def _figures(found: "ConceptFit") -> dict[str, Any]:
    return {
        "read_layers": [one.layer for one in found.probes],
        "train_answers": found.train_answers,
        "validation_answers": found.validation_answers,
        "train_tokens": found.train_tokens,
        "validation_tokens": found.validation_tokens,
    }
