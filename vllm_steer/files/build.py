"""Builds steers from the tensors of a file and their metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.applicable_keys import check_keys_apply
from vllm_steer.files.json_text import read_json
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import (
    ConditionSteer,
    DeltaSteer,
    LMSteer,
    LowRankSteer,
    SAESteer,
    Variant,
    VectorSteer,
)
from vllm_steer.steers.checks import check_choice
from vllm_steer.steers.sae import SAE_MODES
from vllm_steer.steers.vector import MODES
from vllm_steer.untrusted_text import shown

Layered = TypeVar("Layered", VectorSteer, DeltaSteer, LowRankSteer, SAESteer, ConditionSteer)


def build_lm_steer(tensors: Mapping[str, Any], overrides: SteerMetadata) -> LMSteer:
    """Build an ``LMSteer`` from the tensors of a file.

    Raises ``SteerError`` for missing metadata, and as ``LMSteer`` does.
    """
    check_keys_apply("lm_steer", overrides)
    if overrides.epsilon is None:
        raise SteerError("epsilon is not in the file; give it as a key, such as epsilon: 0.001")
    steer = LMSteer(
        variant=overrides.variant or _variant_of(tensors),
        epsilon=overrides.epsilon,
        hidden_size=overrides.hidden_size or _width(tensors),
        fixed_columns=overrides.fixed_columns or (),
        default_strength=overrides.default_strength,
        base_model=overrides.base_model or "",
        description=overrides.description or "",
        **tensors,
    )
    return _keep_columns(steer, overrides.columns)


def _width(tensors: Mapping[str, torch.Tensor]) -> int:
    if not tensors:
        raise SteerError("the file has no tensors")
    if "offset" in tensors:
        raise SteerError("hidden_size cannot be read from an offset steer; give it as a key")
    name, tensor = next(iter(tensors.items()))
    if tensor.ndim < 2:
        raise SteerError(f"tensor {name} is {list(tensor.shape)}; expected a [columns, ...] tensor")
    return int(tensor.shape[1])


def _variant_of(tensors: Mapping[str, torch.Tensor]) -> Variant:
    if "projector1" in tensors:
        return "multiply"
    return "add" if "add" in tensors else "offset"


def _keep_columns(steer: LMSteer, columns: tuple[int, ...] | None) -> LMSteer:
    """The steer with some of its columns; fixed columns are renumbered."""
    if columns is None:
        return steer
    outside = [c for c in columns if not 0 <= c < steer.columns]
    if outside or not columns or len(set(columns)) != len(columns):
        raise SteerError(
            f"columns {shown(list(columns))}: this steer has columns 0 to {steer.columns - 1}; "
            "list each column to keep once"
        )
    tensors: dict[str, Any] = {name: t[list(columns)] for name, t in steer.tensors.items()}
    fixed = tuple(i for i, c in enumerate(columns) if c in steer.fixed_columns)
    return replace(steer, fixed_columns=fixed, **tensors)


def build_vector(
    vectors: torch.Tensor,
    layers: Sequence[int],
    overrides: SteerMetadata,
    *,
    layer_scores: Sequence[float] | None = None,
) -> VectorSteer:
    """Build a ``VectorSteer`` with the file's ``layers``, or those in ``overrides.layers``."""
    check_keys_apply("vector", overrides)
    mode = overrides.mode or "add"
    steer = VectorSteer(
        vectors=vectors,
        layers=tuple(layers),
        site=overrides.site or "resid",  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        **_bounds(overrides, mode, MODES, bounded="project"),
        layer_scores=None if layer_scores is None else tuple(layer_scores),
        default_strength=overrides.default_strength,
        base_model=overrides.base_model or "",
        description=overrides.description or "",
    )
    return _with_requested_layers(steer, overrides)


def build_delta(delta: torch.Tensor, layers: Sequence[int], overrides: SteerMetadata) -> DeltaSteer:
    """Build a ``DeltaSteer`` with the file's ``layers``, or those in ``overrides.layers``."""
    check_keys_apply("delta", overrides)
    steer = DeltaSteer(
        delta=delta,
        layers=tuple(layers),
        site=overrides.site or "heads",  # type: ignore[arg-type]
        schedule=overrides.schedule or "fixed",
        default_strength=overrides.default_strength,
        base_model=overrides.base_model or "",
        description=overrides.description or "",
    )
    return _with_requested_layers(steer, overrides)


def build_low_rank(
    tensors: Mapping[str, torch.Tensor], layers: Sequence[int], overrides: SteerMetadata
) -> LowRankSteer:
    """Build a ``LowRankSteer`` from ``a``, ``b`` and perhaps ``bias`` of ``layers``."""
    check_keys_apply("low_rank", overrides)
    steer = LowRankSteer(
        a=tensors["a"],
        b=tensors["b"],
        bias=tensors.get("bias"),
        layers=tuple(layers),
        site=overrides.site or "resid",  # type: ignore[arg-type]
        default_strength=overrides.default_strength,
        base_model=overrides.base_model or "",
        description=overrides.description or "",
    )
    return _with_requested_layers(steer, overrides)


def build_sae(
    tensors: Mapping[str, Any], layers: Sequence[int], overrides: SteerMetadata
) -> SAESteer:
    """Build an ``SAESteer`` from ``encoder``, ``decoder``, ``bias`` and ``threshold``."""
    check_keys_apply("sae", overrides)
    mode = overrides.mode or "clamp"
    steer = SAESteer(
        **tensors,
        layers=tuple(layers),
        site=overrides.site or "resid",  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        **_bounds(overrides, mode, SAE_MODES, bounded="clamp"),
        default_strength=overrides.default_strength,
        base_model=overrides.base_model or "",
        description=overrides.description or "",
    )
    return _with_requested_layers(steer, overrides)


def build_condition(
    vector: torch.Tensor, layers: Sequence[int], overrides: SteerMetadata
) -> ConditionSteer:
    """Build a ``ConditionSteer`` from a vector ``[1, hidden]`` of one layer."""
    check_keys_apply("condition", overrides)
    if overrides.threshold is None:
        raise SteerError(
            "threshold is not in the file; give it as a key, such as threshold: 0.05: a condition "
            "holds if its similarity is above it (side: below, if it is below it)"
        )
    steer = ConditionSteer(
        vector=vector,
        layers=tuple(layers),
        threshold=overrides.threshold,
        site=overrides.site or "resid",  # type: ignore[arg-type]
        similarity=overrides.similarity or "cosine",
        side=overrides.side or "above",
        tokens=overrides.tokens or "last",
        base_model=overrides.base_model or "",
        description=overrides.description or "",
    )
    return _with_requested_layers(steer, overrides)


def _bounds(
    overrides: SteerMetadata, mode: str, modes: tuple[str, ...], *, bounded: str
) -> dict[str, Any]:
    """The given bounds; ``SteerError`` if there are some and ``mode`` is not ``bounded``."""
    check_choice("mode", mode, modes)
    values = {"low": overrides.low, "high": overrides.high}
    given = {name: value for name, value in values.items() if value is not None}
    if given and mode != bounded:
        raise SteerError(
            f"{', '.join(given)} does not apply to mode {mode}; remove the key, or give mode: "
            f"{bounded}"
        )
    return given


def read_scores(text: str | None) -> tuple[float, ...] | None:
    """Parse the metadata key ``layer_scores``, a JSON list of finite numbers."""
    if text is None:
        return None
    scores = read_json(text, "metadata: layer_scores")
    if not isinstance(scores, list) or not all(map(_is_finite, scores)):
        raise SteerError(f"layer_scores is {shown(text)}; expected a JSON list of finite numbers")
    return tuple(map(float, scores))


def _is_finite(number: Any) -> bool:
    return type(number) in (int, float) and abs(number) < 1e300


def _with_requested_layers(steer: Layered, overrides: SteerMetadata) -> Layered:
    """Check ``hidden_size`` and keep the layers that ``overrides.layers`` selects."""
    if overrides.hidden_size not in (None, steer.hidden_size):
        if isinstance(steer, DeltaSteer):
            declared = f"the key hidden_size, the width of its site, is {overrides.hidden_size}"
        else:
            declared = f"hidden_size is {overrides.hidden_size}"
        raise SteerError(f"tensor width is {steer.hidden_size} but {declared}")
    return steer if overrides.layers is None else steer.keep_layers(overrides.layers)
