"""``vllm-steer fit delta``: step deltas from two sets of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_steer.cli.fit import guidance_options as options
from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output


def delta(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    wanted: Annotated[Path, typer.Option(help="Rows of input and output with the property.")],
    other: Annotated[Path, typer.Option(help="Rows of input and output without it.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="Use each row as a prompt, unchanged.")
    ] = False,
    icl_examples: Annotated[
        int, typer.Option(min=0, help="Demonstrations before each question.")
    ] = 4,
    instruction: Annotated[str, typer.Option(help="First line of each prompt.")] = "",
    input_field: Annotated[str, typer.Option(help="Name of the question in a row.")] = "input",
    output_field: Annotated[str, typer.Option(help="Name of the answer in a row.")] = "output",
    text_field: Annotated[str, typer.Option(help="Name of the prompt, with --plain.")] = "text",
    support: Annotated[
        int, typer.Option(min=1, callback=bounded, help="Prompts drawn, with replacement.")
    ] = 30,
    all_prompts: Annotated[
        bool, typer.Option("--all", help="Use every prompt once instead.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, callback=bounded, help="Tokens generated, and deltas.")
    ] = 30,
    site: Annotated[str, typer.Option(help="heads, resid, attn_in or attn_out.")] = "heads",
    schedule: Annotated[
        str, typer.Option(help="Schedule of requests that give none: fixed, start or dim.")
    ] = "fixed",
    layers: options.Layers = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, callback=bounded, help="Maximum tokens of a prompt.", show_default="the context"
        ),
    ] = None,
    batch_size: options.BatchSize = 16,
    seed: Annotated[int, typer.Option(callback=bounded, help="Seed of the drawing.")] = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    default_strength: options.DefaultStrength = None,
    description: options.Description = "",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit step deltas: the mean difference of activations per generation step."""
    check_output(output, force, inputs=[wanted, other])
    check_named(model, description)
    layer_numbers = options.read_layers(layers)
    from dataclasses import replace

    from vllm_steer.cli.progress import progress
    from vllm_steer.fit.delta import fit_delta
    from vllm_steer.fit.recipe import recipe
    from vllm_steer.fit.relative_size import size_on_texts
    from vllm_steer.steers.checks import check_choice
    from vllm_steer.steers.schedules import SCHEDULES
    from vllm_steer.texts import icl, read_texts

    check_choice("schedule", schedule, SCHEDULES)
    if plain:
        names = ("instruction", "icl_examples", "input_field", "output_field")
        options.reject_options(context, names, "with --plain, where a row is the whole prompt")
    if all_prompts:
        options.reject_options(context, ("support", "seed"), "with --all, which draws nothing")

    def prompts_of(path: Path) -> list[str]:
        if plain:
            return list(read_texts(path, text_field=text_field))
        rows = icl.read_examples(path, input_field=input_field, output_field=output_field)
        return icl.icl_prompts(rows, icl_examples, instruction=instruction)

    sides = prompts_of(wanted), prompts_of(other)
    if not all_prompts:
        sides = icl.support(*sides, support, seed)
    language = options.open_model(model, dtype, device)
    with progress("answering prompts", len(sides[0]) + len(sides[1])) as advance:
        fitted = fit_delta(
            language.model,
            language.tokenizer,
            *sides,
            steps=steps,
            site=site,  # type: ignore[arg-type]  # checked there
            layers=layer_numbers,
            batch_size=batch_size,
            max_length=max_length,
            on_prompt=advance,
        )
    figures = {"steps": steps, "wanted_prompts": len(sides[0]), "other_prompts": len(sides[1])}
    recipe_data = recipe(
        "delta",
        model=model,
        data=[wanted, other],
        settings=options.settings_of(context, ("wanted", "other")),
        figures=figures,
    )
    steer = options.write(
        replace(fitted, schedule=schedule),  # type: ignore[arg-type]
        output,
        model=model,
        default_strength=default_strength,
        description=description,
        recipe=recipe_data,
    )
    norms = steer.delta.double().norm(dim=2)
    by_layer = {
        name: dict(zip(steer.layers, values.tolist(), strict=True))
        for name, values in (("first_norm", norms[0]), ("mean_norm", norms.mean(0)))
    }
    size = size_on_texts(language.model, language.tokenizer, steer, sides[0])
    options.report(steer, output, by_layer, figures, as_json=as_json, size=size)
