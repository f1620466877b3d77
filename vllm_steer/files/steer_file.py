"""The project's own steer file: safetensors with string metadata, format version 1."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.bounds import check_nesting
from vllm_steer.files.facts import Facts, read_facts
from vllm_steer.files.json_text import read_json
from vllm_steer.files.make import make_delta, make_lm_steer, make_vector, read_scores
from vllm_steer.files.safetensors_bytes import check_metadata, check_text, write_safetensors
from vllm_steer.files.safetensors_file import read_tensors
from vllm_steer.files.whole import write_whole
from vllm_steer.foreign import is_number, listed, shown
from vllm_steer.steers import KINDS, DeltaSteer, LMSteer, Steer
from vllm_steer.steers.layers import format_layers

FORMAT = "vllm-steer"
FORMAT_VERSION = "1"
_TENSORS = {
    "lm_steer": frozenset({"projector1", "projector2", "add", "offset"}),
    "vector": frozenset({"vectors"}),
    "delta": frozenset({"delta"}),
}
_LAYOUT = {
    "lm_steer": "projector1 and projector2, or add, or offset",
    "vector": "vectors",
    "delta": "delta",
}
_FACTS = (
    "kind",
    "variant",
    "hidden_size",
    "epsilon",
    "fixed_columns",
    "layers",
    "site",
    "mode",
    "schedule",
    "default_strength",
    "base_model",
    "description",
)


def save_steer(steer: Steer, path: str | Path) -> None:
    """Write a steer as one safetensors file that ``load_steer`` reads back unchanged.

    The same steer gives the same bytes. A file that is there already is replaced at once and whole,
    or stays as it is; a symbolic link is replaced, and what it names is left alone.

    Raises ``SteerError`` if it cannot be written, and before anything is written for what could not
    be read back: a recipe that is no JSON, texts that are no UTF-8, more metadata than is read.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": steer.kind,
        _size_key(steer.kind): str(int(steer.hidden_size)),
        "base_model": steer.base_model,
        "description": steer.description,
        **_metadata_of(steer),
    }
    if steer.default_strength is not None:
        metadata["default_strength"] = repr(float(steer.default_strength))
    if steer.recipe is not None:
        metadata["recipe"] = _recipe_text(steer.recipe)
    check_metadata(metadata)
    _check_facts(metadata)
    write_whole(path, lambda file: write_safetensors(file, steer.tensors, metadata))


def read_steer_file(path: Path, metadata: Mapping[str, str], facts: Facts) -> Steer:
    """Read a file that ``save_steer`` wrote, or one of the same layout."""
    steer = _read(path, metadata, facts)
    return replace(steer, recipe=_read_recipe(metadata.get("recipe")))


def _read(path: Path, metadata: Mapping[str, str], facts: Facts) -> Steer:
    _check_format(metadata)
    tensors = read_tensors(path)
    kind = metadata["kind"]
    if kind not in KINDS:
        raise SteerError(f"kind is {shown(kind)}; this release reads {', '.join(KINDS)}")
    if facts.kind not in (None, kind):
        raise SteerError(f"kind is {kind} in the file but given as {facts.kind}; drop the key")
    _check_tensors(kind, tensors)
    found = read_facts(_facts_in(metadata), origin="metadata")
    if kind == "lm_steer":
        return make_lm_steer(tensors, facts.over(found))
    if found.layers is None:
        raise SteerError("metadata lacks layers")
    # The file's layers say what its rows are, the caller's which of them to keep.
    known = facts.over(found.model_copy(update={"layers": None}))
    if kind == "delta":
        return make_delta(tensors["delta"], found.layers, known)
    scores = read_scores(metadata.get("layer_scores"))
    return make_vector(tensors["vectors"], found.layers, known, layer_scores=scores)


def _read_recipe(text: str | None) -> Mapping[str, Any] | None:
    if text is None:
        return None
    recipe = read_json(text, "metadata: recipe")
    if not isinstance(recipe, dict):
        raise SteerError(f"metadata: recipe is {shown(recipe)}; expected a JSON object")
    return recipe


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as JSON; ``SteerError`` unless it is a JSON object that is read back as it is."""
    check_nesting(recipe, "recipe")  # first: it can stand for more than there is time to write
    _check_texts(recipe)
    try:
        text = json.dumps(recipe, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SteerError(f"recipe is no JSON ({cause(error)}); give plain values") from None
    _read_recipe(text)
    return text


def _check_texts(value: Any) -> None:
    """Raise ``SteerError`` for a key that JSON would turn into a text, and for no UTF-8."""
    if isinstance(value, str):
        check_text("recipe", value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise SteerError(f"recipe has the key {shown(key)}; JSON's keys are texts")
            check_text("recipe", key)
            _check_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_texts(inner)


def _check_facts(metadata: Mapping[str, str]) -> None:
    """Raise ``SteerError`` for facts that could not be read back, such as too many layers."""
    read_facts(_facts_in(metadata), origin="metadata")
    read_scores(metadata.get("layer_scores"))


def _size_key(kind: str) -> str:
    """A delta has the width of its site, which need not be the model's hidden size."""
    return "width" if kind == "delta" else "hidden_size"


def _facts_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that ``Facts`` knows. Files written before deltas had ``width`` have it as
    ``hidden_size``.
    """
    facts = {key: metadata[key] for key in _FACTS if key in metadata}
    if metadata.get("kind") == "delta" and "width" in metadata:
        width = metadata["width"]
        if not is_number(width):
            raise SteerError(f"metadata: width is {shown(width)}; expected a number")
        facts["hidden_size"] = width
    return facts


def _metadata_of(steer: Steer) -> dict[str, str]:
    """What only this kind of steer says."""
    if isinstance(steer, LMSteer):
        return {
            "variant": steer.variant,
            "epsilon": repr(float(steer.epsilon)),
            "fixed_columns": ",".join(map(str, steer.fixed_columns)),
        }
    layered = {"layers": format_layers(steer.layers), "site": steer.site}
    if isinstance(steer, DeltaSteer):
        return {**layered, "schedule": steer.schedule}
    said = {**layered, "mode": steer.mode}
    if steer.layer_scores is not None:
        said["layer_scores"] = json.dumps(list(map(float, steer.layer_scores)))
    return said


def _check_tensors(kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
    wanted = _TENSORS[kind]
    unknown = sorted(set(tensors) - wanted)
    if unknown or not tensors:
        raise SteerError(
            f"unknown tensors {listed(unknown, none='(none)')}; a file of kind {kind} holds "
            f"{_LAYOUT[kind]}"
        )


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise SteerError(
            f"metadata format is {shown(metadata.get('format'))}; expected {FORMAT!r}; of other "
            "tools' safetensors files, concept-guidance's (W, b, a) and SAE weights (W_dec) are "
            "read"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise SteerError(
            f"format_version is {shown(metadata.get('format_version'))}; this release reads "
            f"{FORMAT_VERSION!r}"
        )
    if "kind" not in metadata:
        raise SteerError("metadata lacks kind")
    sizes = ("width", "hidden_size") if metadata["kind"] == "delta" else ("hidden_size",)
    if not any(key in metadata for key in sizes):
        raise SteerError(f"metadata lacks {sizes[0]}")
    if len({metadata[key] for key in sizes if key in metadata}) > 1:
        raise SteerError(
            f"metadata: width is {shown(metadata['width'])} and hidden_size "
            f"{shown(metadata['hidden_size'])}; a delta has one width, that of its site"
        )
