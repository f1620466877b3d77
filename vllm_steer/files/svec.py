"""Vectors of IBM's activation-steering: JSON with ``directions: {"L": [...]}`` (``.svec``).

The library wraps block ``L`` (from 0) in a LeashLayer, which adds direction ``L`` to the block's
*input* before the block runs (``leash_layer.py``, ``forward``). That is the output of block
``L - 1``, so direction ``L`` is a steer of layer ``L - 1`` at ``resid`` here; to steer as its
``behavior_layer_ids`` 10 to 15 do, keep ``layers: 9-14``. (The direction itself was taken from
``hidden_states[L + 1]``, the output of block ``L``, by ``steering_vector.py``; where it acts is
what counts.) Direction 0 acts on the embeddings, before any block, and cannot be served.

A condition vector of the same library looks the same in a file; it is not meant to be added.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.directions import read_layer, stack_directions
from vllm_steer.files.facts import Facts
from vllm_steer.files.json_text import each_once
from vllm_steer.files.make import make_vector
from vllm_steer.foreign import shown
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.layers import format_layers

NAME = "an activation-steering file (.svec)"
_LARGEST = 16 * 2**20
_MOST_CONTAINERS = 100_000
_WANTED = 'expected a JSON object with model_type and directions {"1": [numbers], ...}'


def read(path: Path, facts: Facts) -> VectorSteer:
    """Add at the output of the block before each direction's."""
    model, found = _parse(path)
    directions = {read_layer(n): torch.tensor(v, dtype=torch.float32) for n, v in found.items()}
    vectors, blocks = stack_directions({n: v for n, v in directions.items() if n > 0})
    layers = [block - 1 for block in blocks]
    if 0 in directions and facts.layers is None:
        raise SteerError(_choose(layers))
    return make_vector(vectors, layers, facts.over(Facts(base_model=model)))


def _parse(path: Path) -> tuple[str, dict[str, list[float]]]:
    """``model_type`` and ``directions``, checked to be what they should be."""
    if path.stat().st_size > _LARGEST:
        raise SteerError(f"a JSON file of more than {_LARGEST} bytes is not read")
    text = path.read_bytes()
    if sum(map(text.count, (b"[", b"{", b":"))) > _MOST_CONTAINERS:  # in memory far larger
        raise SteerError(f"a JSON file of more than {_MOST_CONTAINERS} lists, objects and keys")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=each_once, parse_int=float)
    except SteerError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise SteerError(f"not readable as JSON ({cause(error)})") from None
    model, directions = (found.get(name) for name in ("model_type", "directions"))
    if not isinstance(model, str):
        raise SteerError(f"model_type is {shown(model)}; {_WANTED}")
    if not isinstance(directions, dict):
        raise SteerError(f"directions is {shown(directions)}; {_WANTED}")
    for layer, direction in directions.items():
        if not isinstance(direction, list) or not set(map(type, direction)) <= {float}:
            raise SteerError(f"direction {shown(layer)} is {shown(direction)}; {_WANTED}")
    return model, directions


def _choose(layers: Sequence[int]) -> str:
    return (
        "its direction 0 acts before the first decoder block, where nothing can be steered here. "
        "The library adds direction L to the input of block L, which is the output of block L-1: "
        f"to do without direction 0, give layers: {format_layers(layers)}; to steer as its "
        "behavior_layer_ids 10-15 do, give layers: 9-14"
    )
