"""Stacks vectors of several layers into one tensor."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.size_limits import check_memory
from vllm_steer.steers.layers import parse_layers
from vllm_steer.untrusted_text import shown

_LAYER = re.compile(r"0|[1-9][0-9]{0,3}")
_MOST_LAYERS = 10_000


def stack_directions(directions: Mapping[int, Any]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Stack vectors as ``[layers, width]`` in ascending order of layers; also returns the layers.

    Raises ``SteerError`` unless all layers have floating vectors of the same width and dtype.
    """
    if not directions:
        raise SteerError("the file has no vectors; expected at least one layer")
    layers = parse_layers([check_layer(layer) for layer in directions])
    vectors = [_check_vector(layer, directions[layer]) for layer in layers]
    first = vectors[0]
    for layer, vector in zip(layers, vectors, strict=True):
        if (vector.shape, vector.dtype) != (first.shape, first.dtype):
            raise SteerError(
                f"the vector of layer {layer} is {list(vector.shape)} in {vector.dtype}, that of "
                f"layer {layers[0]} {list(first.shape)} in {first.dtype}; they must be equal"
            )
    # Rows are copied one by one: not every floating dtype can be stacked.
    stacked = first.new_empty(len(vectors), *first.shape)
    for row, vector in zip(stacked, vectors, strict=True):
        row.copy_(vector)
    return stacked, layers


def repeated(vector: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """The same vector for each layer, ``[len(layers), width]``."""
    check_memory(len(layers) * vector.nbytes, vector.nbytes, f"a vector in {len(layers)} layers")
    return vector.expand(len(layers), -1).contiguous()


def read_layer(text: str) -> int:
    """Parse a layer number of a file; ``SteerError`` unless it is a plain whole number."""
    if not _LAYER.fullmatch(text):
        raise SteerError(f"layer {shown(text)}: expected a 0-based layer such as '16'")
    return int(text)


def check_layer(layer: Any) -> int:
    """Check that a dict key is a layer number, an integer of at least 0."""
    if type(layer) is not int or not 0 <= layer < _MOST_LAYERS:
        raise SteerError(
            f"layer {shown(layer)}: expected a 0-based layer such as 16; a layer counted "
            "from the end must be given as its number from the start"
        )
    return layer


def _check_vector(layer: int, vector: Any) -> torch.Tensor:
    if not isinstance(vector, torch.Tensor):
        raise SteerError(f"layer {layer} is a {type(vector).__name__}; expected a tensor")
    if vector.ndim != 1 or not vector.is_floating_point() or not vector.numel():
        raise SteerError(
            f"the vector of layer {layer} is {list(vector.shape)} in {vector.dtype}; "
            "expected one dimension of a floating dtype"
        )
    return vector.detach()
