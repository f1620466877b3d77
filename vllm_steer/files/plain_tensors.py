"""Reads plain tensors of ``torch.save``. Missing metadata is required, never guessed.

| tensor              | required keys                | result                                |
|---------------------|------------------------------|---------------------------------------|
| `[d]`               | `layers`                     | the same vector in each layer         |
| `[L, d]`            | `layers`, one per row        | one vector per layer                  |
| `{layer: [d]}`      | none                         | the keys are 0-based decoder blocks   |
| `[steps, L, width]` | `kind: delta` and `layers`   | a step delta                          |

``rows`` selects rows of ``[L, d]`` before ``layers`` are assigned.

Layers are decoder blocks, counted from 0; the default of ``site`` is ``resid``, the block's output.
In Transformers ``hidden_states[0]`` are the embeddings and ``hidden_states[i]`` is the output of
block ``i - 1``. Persona vectors (Chen et al., 2025, arXiv 2507.21509) are numbered that way.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_delta, build_vector
from vllm_steer.files.layer_vectors import repeated, stack_directions
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import DeltaSteer, VectorSteer
from vllm_steer.steers.layers import format_layers

NAME = "a plain tensor"
BY_LAYER = "a dict of tensors by layer"


def read_by_layer(directions: Mapping[int, Any], overrides: SteerMetadata) -> VectorSteer:
    """A steer with one vector per key of the dict."""
    vectors, layers = stack_directions(directions)
    return build_vector(vectors, layers, overrides)


def read_tensor(tensor: torch.Tensor, overrides: SteerMetadata) -> VectorSteer | DeltaSteer:
    """A steer in the layers that ``overrides.layers`` lists."""
    if 0 in tensor.shape or tensor.ndim not in (1, 2, 3):
        raise SteerError(f"a tensor {list(tensor.shape)}; expected [d], [L, d], [steps, L, width]")
    if tensor.ndim == 3:
        return _delta(tensor, overrides)
    if overrides.kind not in (None, "vector"):
        raise SteerError(
            f"a tensor {list(tensor.shape)} cannot be a steer of kind {overrides.kind}; expected "
            "kind: vector"
        )
    return _same_vector(tensor, overrides) if tensor.ndim == 1 else _vectors(tensor, overrides)


def _same_vector(vector: torch.Tensor, overrides: SteerMetadata) -> VectorSteer:
    if overrides.rows is not None:
        raise SteerError(f"rows does not apply to a tensor {list(vector.shape)}; remove the key")
    if overrides.layers is None:
        raise SteerError(
            f"a tensor {list(vector.shape)} does not say which layers it is for; give the key "
            "layers, the "
            "0-based decoder blocks, such as layers: 16; each of several layers gets the same "
            "vector"
        )
    return build_vector(
        repeated(vector, overrides.layers), overrides.layers, _without_layers(overrides)
    )


def _vectors(tensor: torch.Tensor, overrides: SteerMetadata) -> VectorSteer:
    rows = range(len(tensor)) if overrides.rows is None else overrides.rows
    if max(rows) >= len(tensor):
        raise SteerError(f"rows {format_layers(rows)}: this tensor has rows 0-{len(tensor) - 1}")
    if overrides.layers is None or len(overrides.layers) != len(rows):
        raise SteerError(_layers_message(tensor, len(rows), overrides))
    return build_vector(tensor[list(rows)], overrides.layers, _without_layers(overrides))


def _layers_message(tensor: torch.Tensor, rows: int, overrides: SteerMetadata) -> str:
    if overrides.layers is None:
        problem = "does not say which layer each row is for"
    else:
        problem = f"has {rows} rows and the key layers has {len(overrides.layers)}"
    last = len(tensor) - 1
    embeddings = (
        "If row i is hidden_states[i] of Transformers (row 0 the embeddings, row i the output of "
        f"block i-1; persona vectors are like that), give rows: 1-{last}, layers: 0-{last - 1}. "
    )
    return (
        f"a tensor {list(tensor.shape)} {problem}; give the key layers, one 0-based decoder "
        "block per row. "
        f"{embeddings if last else ''}If row i is the output of block i, give layers: 0-{last}. "
        "The key rows selects rows first"
    )


def _delta(tensor: torch.Tensor, overrides: SteerMetadata) -> DeltaSteer:
    steps, layers, _ = tensor.shape
    if overrides.rows is not None:
        raise SteerError(f"rows does not apply to a tensor {list(tensor.shape)}; remove the key")
    if overrides.kind != "delta" or overrides.layers is None or len(overrides.layers) != layers:
        raise SteerError(
            f"a tensor {list(tensor.shape)} may be a step delta of {steps} steps and {layers} "
            "layers; "
            f"if so, give kind: delta, layers ({layers} 0-based decoder blocks), and site unless "
            "it is heads. If it is a vector, squeeze it to [d] or [L, d]"
        )
    return build_delta(tensor, overrides.layers, _without_layers(overrides))


def _without_layers(overrides: SteerMetadata) -> SteerMetadata:
    """The overrides without ``layers``, which number the rows here and select nothing."""
    return overrides.model_copy(update={"layers": None})
