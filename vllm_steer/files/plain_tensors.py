"""Plain tensors of ``torch.save``: what they leave open is asked for, not guessed.

| tensor              | asked for                    | what it becomes                       |
|---------------------|------------------------------|---------------------------------------|
| `[d]`               | `layers`                     | the same vector at each of the layers |
| `[L, d]`            | `layers`, one per row        | a vector a layer; `rows` picks first  |
| `{layer: [d]}`      | nothing                      | the keys are 0-based decoder blocks   |
| `[steps, L, width]` | `kind: delta` and `layers`   | a delta                               |

Layers are decoder blocks, counted from 0; ``site`` is ``resid``, the block's output, unless given.
Hidden states of Transformers have the embeddings first: ``hidden_states[i]`` is the output of block
``i - 1``. Persona vectors (Chen et al., 2025, arXiv 2507.21509) are numbered that way.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.directions import repeated, stack_directions
from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_delta, make_vector
from vllm_steer.steers import DeltaSteer, VectorSteer
from vllm_steer.steers.layers import format_layers

NAME = "a plain tensor"
BY_LAYER = "a dict of tensors by layer"


def read_by_layer(directions: Mapping[int, Any], facts: Facts) -> VectorSteer:
    """A vector per key of the dict."""
    vectors, layers = stack_directions(directions)
    return make_vector(vectors, layers, facts)


def read_tensor(tensor: torch.Tensor, facts: Facts) -> VectorSteer | DeltaSteer:
    """A steer of the layers that the facts name."""
    if 0 in tensor.shape or tensor.ndim not in (1, 2, 3):
        raise SteerError(f"a tensor {list(tensor.shape)}; expected [d], [L, d], [steps, L, width]")
    if tensor.ndim == 3:
        return _delta(tensor, facts)
    if facts.kind not in (None, "vector"):
        raise SteerError(f"a tensor {list(tensor.shape)} is no {facts.kind}; give kind: vector")
    return _same_vector(tensor, facts) if tensor.ndim == 1 else _vectors(tensor, facts)


def _same_vector(vector: torch.Tensor, facts: Facts) -> VectorSteer:
    if facts.rows is not None:
        raise SteerError(f"rows means nothing for a tensor {list(vector.shape)}; drop it")
    if facts.layers is None:
        raise SteerError(
            f"a tensor {list(vector.shape)} does not say where it is added; give layers, the "
            "decoder blocks (from 0) whose output it is for, such as layers: 16; several get the "
            "same vector each"
        )
    return make_vector(repeated(vector, facts.layers), facts.layers, _settled(facts))


def _vectors(tensor: torch.Tensor, facts: Facts) -> VectorSteer:
    rows = range(len(tensor)) if facts.rows is None else facts.rows
    if max(rows) >= len(tensor):
        raise SteerError(f"rows {format_layers(rows)}: this tensor has rows 0-{len(tensor) - 1}")
    if facts.layers is None or len(facts.layers) != len(rows):
        raise SteerError(_which_layers(tensor, len(rows), facts))
    return make_vector(tensor[list(rows)], facts.layers, _settled(facts))


def _which_layers(tensor: torch.Tensor, rows: int, facts: Facts) -> str:
    if facts.layers is None:
        said = "does not say which decoder block each row is for"
    else:
        said = f"has {rows} rows and layers names {len(facts.layers)}"
    last = len(tensor) - 1
    embeddings = (
        "If row i is hidden_states[i] of Transformers (row 0 the embeddings, row i the output of "
        f"block i-1; persona vectors are like that), give rows: 1-{last}, layers: 0-{last - 1}. "
    )
    return (
        f"a tensor {list(tensor.shape)} {said}; give layers, one decoder block (from 0) per row. "
        f"{embeddings if last else ''}If row i is the output of block i, give layers: 0-{last}. "
        "rows picks some of the rows first"
    )


def _delta(tensor: torch.Tensor, facts: Facts) -> DeltaSteer:
    steps, layers, _ = tensor.shape
    if facts.rows is not None:
        raise SteerError(f"rows means nothing for a tensor {list(tensor.shape)}; drop it")
    if facts.kind != "delta" or facts.layers is None or len(facts.layers) != layers:
        raise SteerError(
            f"a tensor {list(tensor.shape)} may be a delta of {steps} steps and {layers} layers; "
            f"if so, give kind: delta and layers, {layers} decoder blocks (from 0), and its site "
            "unless it is heads. Vectors are [d] or [L, d]: squeeze them"
        )
    return make_delta(tensor, facts.layers, _settled(facts))


def _settled(facts: Facts) -> Facts:
    """Without the layers: they said what the rows are, not which to keep."""
    return facts.model_copy(update={"layers": None})
