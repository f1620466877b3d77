"""Reads and writes vllm-steer's file format: safetensors with string metadata, version 1."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.atomic_write import write_atomically
from vllm_steer.files.build import (
    build_condition,
    build_delta,
    build_lm_steer,
    build_low_rank,
    build_sae,
    build_vector,
    read_scores,
)
from vllm_steer.files.conversions import converted_kinds, read_converted
from vllm_steer.files.json_text import read_json
from vllm_steer.files.safetensors_file import read_tensors
from vllm_steer.files.safetensors_writer import check_metadata, check_text, write_safetensors
from vllm_steer.files.size_limits import check_nesting
from vllm_steer.files.steer_metadata import SteerMetadata, read_metadata
from vllm_steer.steers import (
    KINDS,
    ConditionSteer,
    DeltaSteer,
    LMSteer,
    LowRankSteer,
    Steer,
    VectorSteer,
)
from vllm_steer.steers.layers import format_layers
from vllm_steer.untrusted_text import is_number, listed, shown

FORMAT = "vllm-steer"
FORMAT_VERSION = "1"
_TENSORS = {
    "lm_steer": frozenset({"projector1", "projector2", "add", "offset"}),
    "vector": frozenset({"vectors"}),
    "delta": frozenset({"delta"}),
    "low_rank": frozenset({"a", "b", "bias"}),
    "sae": frozenset({"encoder", "decoder", "bias", "threshold"}),
    "condition": frozenset({"vector"}),
}
_REQUIRED = {"low_rank": frozenset({"a", "b"}), "sae": _TENSORS["sae"]}
_LAYOUT = {
    "lm_steer": "projector1 and projector2, or add, or offset",
    "vector": "vectors",
    "delta": "delta",
    "low_rank": "a and b, and perhaps bias",
    "sae": "encoder, decoder, bias and threshold",
    "condition": "vector",
}
_METADATA_KEYS = (
    "kind",
    "variant",
    "hidden_size",
    "epsilon",
    "fixed_columns",
    "layers",
    "site",
    "mode",
    "low",
    "high",
    "schedule",
    "threshold",
    "similarity",
    "side",
    "tokens",
    "default_strength",
    "base_model",
    "description",
)


def save_steer(steer: Steer, path: str | Path) -> None:
    """Write a steer to a safetensors file; ``load_steer`` returns an equal steer.

    Equal steers give equal bytes. The file is written atomically: an existing file is replaced as a
    whole or stays unchanged. A symbolic link is replaced, not followed.

    Raises ``SteerError`` if the file cannot be written. Raises it before writing for content that
    could not be read back: a recipe that is not JSON, strings that are not valid Unicode, or
    metadata above the size limit.

    >>> import tempfile, torch
    >>> from vllm_steer import VectorSteer, load_steer, save_steer
    >>> steer = VectorSteer(vectors=torch.ones(1, 8), layers=(16,), default_strength=4.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_steer(steer, f"{folder}/calm.safetensors")
    ...     load_steer(f"{folder}/calm.safetensors").default_strength
    4.0
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
    _check_readable(metadata)
    write_atomically(path, lambda file: write_safetensors(file, steer.tensors, metadata))


def read_steer_file(path: Path, metadata: Mapping[str, str], overrides: SteerMetadata) -> Steer:
    """Read a file of ``save_steer``, or one with the same layout."""
    steer = _read(path, metadata, overrides)
    return replace(steer, recipe=_read_recipe(metadata.get("recipe")))


def _read(path: Path, metadata: Mapping[str, str], overrides: SteerMetadata) -> Steer:
    _check_format(metadata)
    kind = metadata["kind"]
    if kind not in KINDS:
        raise SteerError(f"kind is {shown(kind)}; expected {', '.join(KINDS)}")
    if overrides.kind in converted_kinds([kind]):
        return read_converted(lambda keys: _build(path, metadata, keys), overrides)
    if overrides.kind not in (None, kind):
        raise SteerError(
            f"kind is {kind} in the file and {overrides.kind} in the overrides; remove the key"
        )
    return _build(path, metadata, overrides)


def _build(path: Path, metadata: Mapping[str, str], overrides: SteerMetadata) -> Steer:
    kind, tensors = metadata["kind"], read_tensors(path)
    _check_tensors(kind, tensors)
    file_metadata = read_metadata(_metadata_fields(metadata), origin="metadata")
    if overrides.mode not in (None, file_metadata.mode):  # the bounds are those of the file's mode
        file_metadata = file_metadata.model_copy(update={"low": None, "high": None})
    if kind == "lm_steer":
        return build_lm_steer(tensors, overrides.completed_by(file_metadata))
    layers = file_metadata.layers
    if layers is None:
        raise SteerError("the metadata has no layers")
    # The file's layers number its rows; the overrides select some of them.
    merged = overrides.completed_by(file_metadata.model_copy(update={"layers": None}))
    if kind == "delta":
        return build_delta(tensors["delta"], layers, merged)
    if kind == "low_rank":
        return build_low_rank(tensors, layers, merged)
    if kind == "sae":
        return build_sae(tensors, layers, merged)
    if kind == "condition":
        return build_condition(tensors["vector"], layers, merged)
    scores = read_scores(metadata.get("layer_scores"))
    return build_vector(tensors["vectors"], layers, merged, layer_scores=scores)


def _read_recipe(text: str | None) -> Mapping[str, Any] | None:
    if text is None:
        return None
    recipe = read_json(text, "metadata: recipe")
    if not isinstance(recipe, dict):
        raise SteerError(f"metadata: recipe is {shown(recipe)}; expected a JSON object")
    return recipe


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as JSON; ``SteerError`` unless it is a JSON object that can be read back."""
    check_nesting(recipe, "recipe")  # first: a nested value may be too large to write
    _check_texts(recipe)
    try:
        text = json.dumps(recipe, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SteerError(
            f"recipe is not JSON ({cause(error)}); expected plain JSON values"
        ) from None
    _read_recipe(text)
    return text


def _check_texts(value: Any) -> None:
    """Raise ``SteerError`` for a key that is not a string, and for invalid Unicode."""
    if isinstance(value, str):
        check_text("recipe", value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise SteerError(f"recipe has the key {shown(key)}; expected string keys")
            check_text("recipe", key)
            _check_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_texts(inner)


def _check_readable(metadata: Mapping[str, str]) -> None:
    """Raise ``SteerError`` for metadata that could not be read back, such as too many layers."""
    read_metadata(_metadata_fields(metadata), origin="metadata")
    read_scores(metadata.get("layer_scores"))


def _size_key(kind: str) -> str:
    """The metadata key of the width: a delta's width is that of its site, not the hidden size."""
    return "width" if kind == "delta" else "hidden_size"


def _metadata_fields(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of ``SteerMetadata``; older delta files have ``hidden_size`` for ``width``."""
    fields = {key: metadata[key] for key in _METADATA_KEYS if key in metadata}
    if metadata.get("kind") == "delta" and "width" in metadata:
        width = metadata["width"]
        if not is_number(width):
            raise SteerError(f"metadata: width is {shown(width)}; expected a number")
        fields["hidden_size"] = width
    return fields


def _metadata_of(steer: Steer) -> dict[str, str]:
    """The metadata of this kind of steer."""
    if isinstance(steer, LMSteer):
        return {
            "variant": steer.variant,
            "epsilon": repr(float(steer.epsilon)),
            "fixed_columns": ",".join(map(str, steer.fixed_columns)),
        }
    layered = {"layers": format_layers(steer.layers), "site": steer.site}
    if isinstance(steer, DeltaSteer):
        return {**layered, "schedule": steer.schedule}
    if isinstance(steer, LowRankSteer):
        return layered
    if isinstance(steer, ConditionSteer):
        tests = {name: getattr(steer, name) for name in ("similarity", "side", "tokens")}
        return {**layered, "threshold": repr(float(steer.threshold)), **tests}
    metadata = {**layered, "mode": steer.mode}
    if steer.has_bounds:
        metadata |= {"low": repr(float(steer.low)), "high": repr(float(steer.high))}
    if isinstance(steer, VectorSteer) and steer.layer_scores is not None:
        metadata["layer_scores"] = json.dumps(list(map(float, steer.layer_scores)))
    return metadata


def _check_tensors(kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
    allowed = _TENSORS[kind]
    unknown = sorted(set(tensors) - allowed)
    missing = sorted(_REQUIRED.get(kind, frozenset()) - set(tensors))
    if tensors and missing and not unknown:
        raise SteerError(
            f"it has no tensor {', '.join(missing)}; a file of kind {kind} has {_LAYOUT[kind]}"
        )
    if unknown or not tensors:
        raise SteerError(
            f"unknown tensors {listed(unknown, none='(none)')}; a file of kind {kind} has "
            f"{_LAYOUT[kind]}"
        )


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise SteerError(
            f"metadata format is {shown(metadata.get('format'))}; expected {FORMAT!r}; of other "
            "tools, safetensors files of concept-guidance (W, b, a) and SAE weights (W_dec) are "
            "supported"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise SteerError(
            f"format_version is {shown(metadata.get('format_version'))}; expected "
            f"{FORMAT_VERSION!r}"
        )
    if "kind" not in metadata:
        raise SteerError("the metadata has no kind")
    sizes = ("width", "hidden_size") if metadata["kind"] == "delta" else ("hidden_size",)
    if not any(key in metadata for key in sizes):
        raise SteerError(f"the metadata has no {sizes[0]}")
    if len({metadata[key] for key in sizes if key in metadata}) > 1:
        raise SteerError(
            f"metadata: width is {shown(metadata['width'])} and hidden_size "
            f"{shown(metadata['hidden_size'])}; a delta has one width, that of its site"
        )
