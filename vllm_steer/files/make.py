"""Builds steers from a file's tensors and metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import Facts
from vllm_steer.files.json_text import read_json
from vllm_steer.foreign import shown
from vllm_steer.steers import DeltaSteer, LMSteer, Variant, VectorSteer
from vllm_steer.steers.sites import HEAD

Layered = TypeVar("Layered", VectorSteer, DeltaSteer)

_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "lm_steer": ("variant", "epsilon", "fixed_columns", "columns"),
    "vector": ("mode",),
    "delta": ("schedule",),
}


def refuse_foreign_facts(kind: str, facts: Facts) -> None:
    """Raise ``SteerError`` for a fact that a steer of this kind has no use for."""
    foreign = [
        name
        for other, names in _ONLY_FOR.items()
        if other != kind
        for name in names
        if getattr(facts, name) is not None
    ]
    if kind == "lm_steer" and facts.layers is not None:
        foreign.append("layers")
    if kind == "lm_steer" and facts.site not in (None, HEAD):
        foreign.append("site")
    if foreign:
        raise SteerError(f"{', '.join(foreign)} means nothing for a steer of kind {kind}; drop it")


def make_lm_steer(tensors: Mapping[str, Any], facts: Facts) -> LMSteer:
    """An ``LMSteer`` from a file's tensors and the facts known about it.

    Raises ``SteerError`` for facts that are missing and for all that ``LMSteer`` itself refuses.
    """
    refuse_foreign_facts("lm_steer", facts)
    if facts.epsilon is None:
        raise SteerError("epsilon is not in the file; give it as a key, such as epsilon: 0.001")
    steer = LMSteer(
        variant=facts.variant or _variant_of(tensors),
        epsilon=facts.epsilon,
        hidden_size=facts.hidden_size or _width(tensors),
        fixed_columns=facts.fixed_columns or (),
        default_strength=facts.default_strength,
        base_model=facts.base_model or "",
        description=facts.description or "",
        **tensors,
    )
    return _keep_columns(steer, facts.columns)


def _width(tensors: Mapping[str, torch.Tensor]) -> int:
    if not tensors:
        raise SteerError("it holds no tensors")
    if "offset" in tensors:
        raise SteerError("an offset steer does not tell the hidden size; give hidden_size as a key")
    name, tensor = next(iter(tensors.items()))
    if tensor.ndim < 2:
        raise SteerError(f"tensor {name} is {list(tensor.shape)}; expected a [columns, ...] tensor")
    return int(tensor.shape[1])


def _variant_of(tensors: Mapping[str, torch.Tensor]) -> Variant:
    if "projector1" in tensors:
        return "multiply"
    return "add" if "add" in tensors else "offset"


def _keep_columns(steer: LMSteer, columns: tuple[int, ...] | None) -> LMSteer:
    """The steer reduced to some of its columns; fixed columns are renumbered with them."""
    if columns is None:
        return steer
    outside = [c for c in columns if not 0 <= c < steer.columns]
    if outside or not columns or len(set(columns)) != len(columns):
        raise SteerError(
            f"columns {shown(list(columns))}: this steer has columns 0 to {steer.columns - 1}; "
            "name each one wanted once"
        )
    tensors: dict[str, Any] = {name: t[list(columns)] for name, t in steer.tensors.items()}
    fixed = tuple(i for i, c in enumerate(columns) if c in steer.fixed_columns)
    return replace(steer, fixed_columns=fixed, **tensors)


def make_vector(
    vectors: torch.Tensor,
    layers: Sequence[int],
    facts: Facts,
    *,
    layer_scores: Sequence[float] | None = None,
) -> VectorSteer:
    """A ``VectorSteer`` of the file's layers, reduced to those that ``facts.layers`` names."""
    refuse_foreign_facts("vector", facts)
    steer = VectorSteer(
        vectors=vectors,
        layers=tuple(layers),
        site=facts.site or "resid",  # type: ignore[arg-type]
        mode=facts.mode or "add",
        layer_scores=None if layer_scores is None else tuple(layer_scores),
        default_strength=facts.default_strength,
        base_model=facts.base_model or "",
        description=facts.description or "",
    )
    return _narrowed(steer, facts)


def make_delta(delta: torch.Tensor, layers: Sequence[int], facts: Facts) -> DeltaSteer:
    """A ``DeltaSteer`` of the file's layers, reduced to those that ``facts.layers`` names."""
    refuse_foreign_facts("delta", facts)
    steer = DeltaSteer(
        delta=delta,
        layers=tuple(layers),
        site=facts.site or "heads",  # type: ignore[arg-type]
        schedule=facts.schedule or "fixed",
        default_strength=facts.default_strength,
        base_model=facts.base_model or "",
        description=facts.description or "",
    )
    return _narrowed(steer, facts)


def read_scores(text: str | None) -> tuple[float, ...] | None:
    """The metadata's ``layer_scores``, a JSON list of finite numbers."""
    if text is None:
        return None
    scores = read_json(text, "metadata: layer_scores")
    if not isinstance(scores, list) or not all(map(_is_finite, scores)):
        raise SteerError(f"layer_scores is {shown(text)}; expected a JSON list of finite numbers")
    return tuple(map(float, scores))


def _is_finite(number: Any) -> bool:
    return type(number) in (int, float) and abs(number) < 1e300


def _narrowed(steer: Layered, facts: Facts) -> Layered:
    if facts.hidden_size not in (None, steer.hidden_size):
        if isinstance(steer, DeltaSteer):
            given = f"the width of its site is given as {facts.hidden_size}"
        else:
            given = f"hidden_size is {facts.hidden_size}"
        raise SteerError(f"tensor width is {steer.hidden_size} but {given}")
    return steer if facts.layers is None else steer.keep_layers(facts.layers)
