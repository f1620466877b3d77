"""``vllm-steer transfer``: transfers an LM-Steer from one model to another."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli.numbers import bounded
from vllm_steer.cli.output import check_named, check_output
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.errors import SteerError
from vllm_steer.tables import Column, Table

if TYPE_CHECKING:
    from vllm_steer.steers import LMSteer
    from vllm_steer.texts import LabelledText
    from vllm_steer.transfer import Effect, TransferResult


@dataclass(frozen=True)
class _Effects:
    """The effect of the steer in its own model and of the transferred steer in the target model."""

    source: "Effect"
    target: "Effect"

    def plain(self) -> dict[str, Any]:
        source = self.source.evidence_per_text
        share = self.target.evidence_per_text / source if source > 0 else None
        return {"source": asdict(self.source), "target": asdict(self.target), "kept": share}


def transfer(
    steer: Annotated[Path, typer.Argument(metavar="STEER", help="LM-Steer to transfer.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE_MODEL", help="The steer's own model.")],
    target: Annotated[str, typer.Argument(metavar="TARGET_MODEL", help="Model to transfer it to.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="vllm-steer file to write.")],
    solver: Annotated[
        str, typer.Option(help="orthogonal, least-squares or authors.")
    ] = "orthogonal",
    seed: Annotated[int, typer.Option(callback=bounded, help="Seed of the solver 'authors'.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Labelled texts to measure the effect on.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Name of the text in a row.")] = "text",
    label_field: Annotated[str, typer.Option(help="Name of the label in a row.")] = "label",
    labels: Annotated[
        str | None, typer.Option(help="Label map: sst2, sst5, ..., or good=1,bad=-1.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Strength of the measurement.")] = 1.0,
    match: Annotated[
        bool,
        typer.Option("--match-strength", help="Scale epsilon to match the effect in SOURCE_MODEL."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Transfer an LM-Steer to another model, over the tokens that both vocabularies share."""
    from vllm_steer.files import load_steer
    from vllm_steer.steers import LMSteer
    from vllm_steer.texts import read_labelled

    check_output(output, force, inputs=[steer, data])
    check_named(target)
    if match and data is None:
        raise SteerError("--match-strength needs labelled texts; give --data")
    texts = (
        []
        if data is None
        else read_labelled(data, text_field=text_field, label_field=label_field, labels=labels)
    )
    original = load_steer(steer)
    transferred = _transfer(original, source, target, solver, seed)
    result, effects = transferred.steer, None
    if isinstance(original, LMSteer) and texts:
        result, effects = _measure(original, result, source, target, texts, strength, match)
    figures = _figures(transferred, effects)
    settings = {"source_model": source, "solver": solver, "seed": seed}
    if data is not None:
        fields = {"text_field": text_field, "label_field": label_field, "labels": labels}
        settings |= {**fields, "strength": strength, "match_strength": match}
    _save(result, output, target, [steer] if data is None else [steer, data], settings, figures)
    if as_json:
        say_json({**figures, "epsilon": result.epsilon, "output": str(output)})
    else:
        Console().print(_table(figures, title=str(output)))


def _transfer(steer: Any, source: str, target: str, solver: Any, seed: int) -> "TransferResult":
    from vllm_steer.inspection import read_output_embedding
    from vllm_steer.models import load_tokenizer
    from vllm_steer.transfer import transfer_steer
    from vllm_steer.transfer.embedding_map import AUTHORS_STEPS

    sides = [(read_output_embedding(name), load_tokenizer(name)) for name in (source, target)]
    with progress("fitting", AUTHORS_STEPS if solver == "authors" else None) as advance:
        return transfer_steer(
            steer, sides[0], sides[1], solver=solver, seed=seed, on_step=lambda done: advance(done)
        )


def _measure(
    original: "LMSteer",
    target_steer: "LMSteer",
    source: str,
    target: str,
    texts: "list[LabelledText]",
    strength: float,
    match: bool,
) -> "tuple[LMSteer, _Effects]":
    """The effects on the texts, after matching the transferred steer's epsilon if requested."""
    from vllm_steer.models import load_language_model
    from vllm_steer.transfer import match_strength, measure_effect

    with progress("reading in the source model", len(texts)) as advance:
        model = load_language_model(source)
        before = measure_effect(
            model, original, texts, strength=strength, on_text=lambda done: advance(done)
        )
    model = load_language_model(target)
    if match:
        with progress("matching strengths") as advance:
            target_steer, after = match_strength(
                model, target_steer, texts, before, on_trial=lambda done: advance(done)
            )
        return target_steer, _Effects(before, after)
    with progress("reading in the target model", len(texts)) as advance:
        after = measure_effect(
            model, target_steer, texts, strength=strength, on_text=lambda done: advance(done)
        )
    return target_steer, _Effects(before, after)


def _save(
    steer: "LMSteer",
    output: Path,
    target: str,
    data: list[Path],
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    from vllm_steer.files import save_steer
    from vllm_steer.fit.recipe import recipe

    recipe_data = recipe("transfer", model=target, data=data, settings=settings, figures=figures)
    if steer.recipe is not None:  # the recipe of the original steer
        recipe_data = {**recipe_data, "source": steer.recipe}
    save_steer(replace(steer, base_model=target, recipe=recipe_data), output)


def _figures(transferred: "TransferResult", effects: _Effects | None) -> dict[str, Any]:
    return {
        "shared_tokens": len(transferred.shared),
        "fit": None if transferred.fit is None else asdict(transferred.fit),
        "effect": None if effects is None else effects.plain(),
    }


def _table(figures: Mapping[str, Any], title: str) -> Table:
    rows = [("shared tokens", str(figures["shared_tokens"]), "")]
    if fit := figures["fit"]:
        rows.append(("relative residual", "", f"{fit['relative_residual']:.3f}"))
        rows.append(("mean cosine", "", f"{fit['mean_cosine']:.3f}"))
    if effect := figures["effect"]:
        for name in ("evidence_per_text", "evidence_per_token", "accuracy"):
            source, target = (f"{effect[side][name]:.3f}" for side in ("source", "target"))
            rows.append((name.replace("_", " "), source, target))
        if effect["kept"] is not None:
            rows.append(("effect kept", "", f"{effect['kept']:.1%}"))
    return Table(title, (Column(""), Column("source"), Column("target")), rows)
