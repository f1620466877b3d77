"""``vllm-steer convert``: convert a supported steer file to vllm-steer's own format."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli.output import check_output
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError
from vllm_steer.tables import Column, Table, facts

if TYPE_CHECKING:
    from vllm_steer.files import LoadedFile
    from vllm_steer.fit.relative_size import RelativeSize
    from vllm_steer.steers import LMSteer, Steer
    from vllm_steer.steers.properties import LayeredSteer


def convert(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Steer file in any supported format, or a folder of pyreft."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="vllm-steer file to write.")],
    kind: Annotated[
        str | None,
        typer.Option(help="lm_steer, vector, delta, low_rank, sae or condition."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="0-based decoder blocks: '8-31', '3,7,9'.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="resid, attn_in, attn_out or heads.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="add, rotate, project or relative; of an SAE's feature: add, clamp or scale."
        ),
    ] = None,
    low: Annotated[
        str | None, typer.Option(help="Lower bound of project and clamp: a number or '-inf'.")
    ] = None,
    high: Annotated[
        str | None, typer.Option(help="Upper bound of project and clamp: a number or 'inf'.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Threshold of a condition.")] = None,
    similarity: Annotated[
        str | None, typer.Option(help="Similarity of a condition: cosine, dot or cast.")
    ] = None,
    side: Annotated[
        str | None, typer.Option(help="Side of the threshold where it holds: above or below.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Prompt tokens that a condition reads: last or any.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Rows of a plain tensor to use.")] = None,
    feature: Annotated[int | None, typer.Option(help="Feature of an SAE.")] = None,
    hook: Annotated[str | None, typer.Option(help="TransformerLens hook point of an SAE.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Of an SAE without its cfg.json: standard, jumprelu or gated."),
    ] = None,
    apply_b_dec_to_input: Annotated[
        bool | None,
        typer.Option(
            "--apply-b-dec-to-input/--no-apply-b-dec-to-input",
            help="Of an SAE without its cfg.json: whether b_dec is subtracted first.",
        ),
    ] = None,
    orient: Annotated[
        bool, typer.Option("--orient", help="Flip concept-guidance rows towards the concept.")
    ] = False,
    schedule: Annotated[str | None, typer.Option(help="fixed, start or dim.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Epsilon of an LM-Steer.")] = None,
    fixed_columns: Annotated[
        str | None, typer.Option(help="LM-Steer columns applied with 1: '1' or '1,2'.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="LM-Steer columns to keep.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="The model's hidden size.")] = None,
    default_strength: Annotated[
        float | None, typer.Option(help="Strength of a request that gives none.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Model the steer is for.")] = None,
    description: Annotated[str | None, typer.Option(help="Free text.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder, hub id or 'embedded': measure what the steer changes of its activations."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts that the model reads.", show_default="a few short ones"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Read a steer file, summarise it, and write it as a vllm-steer file."""
    from vllm_steer.files import read_file, save_steer

    check_output(output, force, inputs=[texts])
    loaded = read_file(source, _facts(context.params))
    size = _size(loaded.steer, model, texts)
    summary = _summary(loaded)
    if as_json:
        sizes = {} if size is None else {"relative_size": size.data}
        say_json({**summary, **sizes, "output": str(output)})
    else:
        Console().print(_table(summary, title=str(output)))
        _print_size(loaded.steer, size)
    sys.stdout.flush()  # fail before the file is written
    save_steer(loaded.steer, output)


def _size(steer: "Steer", model: str | None, texts: Path | None) -> "RelativeSize | None":
    """How much the steer changes a model's activations; None if no model was given."""
    if model is None:
        if texts is not None:
            raise SteerError("texts are read by a model; give --model too")
        return None
    if not _has_size(steer):
        raise SteerError(
            f"--model does not apply to a steer of kind {steer.kind}, which adds nothing to the "
            "activations inside the layers; drop it"
        )
    from vllm_steer.fit.relative_size import SHORT_TEXTS, size_on_texts
    from vllm_steer.models import load_language_model
    from vllm_steer.texts import read_texts

    read = SHORT_TEXTS if texts is None else read_texts(texts)
    language = load_language_model(model)
    return size_on_texts(language.model, language.tokenizer, steer, read)  # type: ignore[arg-type]


def _has_size(steer: "Steer") -> bool:
    return steer.kind not in ("lm_steer", "condition")


def _print_size(steer: "Steer", size: "RelativeSize | None") -> None:
    if size is not None:
        rows = [[n, one.activation, one.change, one.share] for n, one in size.layers.items()]
        names = ("|h|", "|v w|", "|v w|/|h|")
        columns = [Column("layer", "d"), *(Column(name, ".4g") for name in names)]
        Console().print(Table("at strength 1", columns, rows))
        say(f"changes {size.message}")
    elif _has_size(steer):
        say("for first strengths give the model: --model NAME prints |v w|/|h| of each layer")


def _facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """The given options that are metadata of the steer, by their key."""
    from vllm_steer.files.steer_metadata import SteerMetadata

    return {
        name: value
        for name, value in options.items()
        if name in SteerMetadata.model_fields and value is not None and (name != "orient" or value)
    }


def _summary(loaded: "LoadedFile") -> dict[str, Any]:
    from vllm_steer.steers import LMSteer

    steer = loaded.steer
    return {
        "format": loaded.format,
        "kind": steer.kind,
        "site": steer.site,
        "hidden_size": steer.hidden_size,
        "default_strength": steer.default_strength,
        "base_model": steer.base_model,
        "description": steer.description,
        **(_head_summary(steer) if isinstance(steer, LMSteer) else _layers_summary(steer)),
    }


def _head_summary(steer: "LMSteer") -> dict[str, Any]:
    return {
        "variant": steer.variant,
        "epsilon": steer.epsilon,
        "columns": steer.columns,
        "fixed_columns": list(steer.fixed_columns),
        "rank": steer.rank,
    }


def _layers_summary(steer: "LayeredSteer") -> dict[str, Any]:
    from vllm_steer.steers.layers import format_layers
    from vllm_steer.steers.properties import layer_norms, properties

    by_layer = zip(steer.layers, layer_norms(steer).tolist(), strict=True)
    return {
        **properties(steer),
        "layers": format_layers(steer.layers),
        "norms": {str(layer): norm for layer, norm in by_layer},
    }


def _table(summary: dict[str, Any], title: str) -> Table:
    values = dict(summary)
    if norms := values.pop("norms", {}).values():
        values["norm per layer"] = f"{min(norms):.4g} to {max(norms):.4g}"
    return facts(title, values)
