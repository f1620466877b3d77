"""Options of the fit commands, and the output that those of steers inside the layers share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError
from vllm_steer.tables import Column, Table

if TYPE_CHECKING:
    from vllm_steer.fit.relative_size import RelativeSize
    from vllm_steer.models import LanguageModel
    from vllm_steer.steers import DeltaSteer, LowRankSteer, VectorSteer

Guidance = TypeVar("Guidance", "VectorSteer", "DeltaSteer", "LowRankSteer")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a causal model, or 'embedded'.")
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Steer file to write.")]
Layers = Annotated[
    str | None, typer.Option(help="0-based decoder blocks: '8-31', '3,7,9'.", show_default="all")
]
BatchSize = Annotated[int, typer.Option(min=1, callback=bounded, help="Texts read at a time.")]
Dtype = Annotated[str, typer.Option(help="The model's dtype, or auto for the checkpoint's own.")]
Device = Annotated[
    str | None, typer.Option(help="Device of the model.", show_default="a GPU if there is one")
]
DefaultStrength = Annotated[
    float | None, typer.Option(help="Strength of a request that gives none.")
]
Description = Annotated[str, typer.Option(help="Free text for the file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def read_layers(layers: str | None) -> tuple[int, ...] | None:
    """The layers of an option; None for all."""
    from vllm_steer.steers.layers import parse_layers

    return None if layers is None else parse_layers(layers)


def reject_options(context: typer.Context, options: Sequence[str], reason: str) -> None:
    """Raise ``SteerError`` if one of the options was given although it does not apply."""
    names = [name for name in options if _is_explicit(context, name)]
    if names:
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise SteerError(f"{flags} does not apply {reason}; drop it")


def _is_explicit(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def open_model(name: str, dtype: str, device: str | None) -> "LanguageModel":
    """Load the model; heavy imports happen only here."""
    from vllm_steer.models import load_language_model

    return load_language_model(name, dtype=dtype, device=device)


def settings_of(context: typer.Context, files: Sequence[str]) -> dict[str, Any]:
    """The options that affect the fit, for the recipe."""
    excluded = {"model", "output", "device", "force", "as_json", "description", "default_strength"}
    return {
        name: value
        for name, value in context.params.items()
        if name not in excluded and name not in files and value is not None
    }


def write(
    steer: Guidance,
    output: Path,
    *,
    model: str,
    default_strength: float | None,
    description: str,
    recipe: Mapping[str, Any],
) -> Guidance:
    """Write the steer file atomically; return the steer as written."""
    from vllm_steer.files import save_steer
    from vllm_steer.models import EMBEDDED

    complete = replace(
        steer,
        base_model="vllm-steer/embedded" if model == EMBEDDED else model,
        default_strength=default_strength,
        description=description,
        recipe=recipe,
    )
    save_steer(complete, output)
    return complete


def report(
    steer: "VectorSteer | DeltaSteer | LowRankSteer",
    output: Path,
    by_layer: Mapping[str, Mapping[int, float | None]],
    figures: Mapping[str, Any],
    *,
    as_json: bool,
    size: "RelativeSize | None" = None,
) -> None:
    """Print the figures to standard output, as JSON or as a table of the layers.

    ``size`` is how much the steer changes activations: it gives a first strength.
    """
    from vllm_steer.steers.layers import format_layers

    if as_json:
        tables = {name: {str(layer): x for layer, x in t.items()} for name, t in by_layer.items()}
        summary = {"kind": steer.kind, "site": steer.site, "layers": format_layers(steer.layers)}
        sizes = {} if size is None else {"relative_size": size.data}
        say_json({"output": str(output), **summary, **figures, **tables, **sizes})
        return
    if size is not None:
        by_layer = {**by_layer, "|h|": {n: one.activation for n, one in size.layers.items()}}
    columns = [Column(name.replace("_", " "), ".4g") for name in by_layer]
    layers = sorted({layer for values in by_layer.values() for layer in values})
    rows = [[layer, *(values.get(layer) for values in by_layer.values())] for layer in layers]
    say(f"{output}: {steer.kind} at {steer.site}, layers {format_layers(steer.layers)}")
    Console().print(Table("", [Column("layer", "d"), *columns], rows))
    if size is not None:
        say(f"changes {size.message}")
