"""Reads vectors of IBM's activation-steering: JSON with ``directions: {"L": [...]}`` (``.svec``).

The library wraps block ``L`` (from 0) in a LeashLayer, which adds direction ``L`` to the block's
*input* before the block runs (``leash_layer.py``, ``forward``). That is the output of block
``L - 1``, so direction ``L`` is a steer of layer ``L - 1`` at ``resid`` here; to steer as its
``behavior_layer_ids`` 10 to 15 do, keep ``layers: 9-14``. (``steering_vector.py`` extracts the
direction from ``hidden_states[L + 1]``, the output of block ``L``; this reader follows where it is
added.) Direction 0 acts on the embeddings, which have no site.

A condition vector of the same library has the same file format; it is not meant to be added. With
``kind: condition`` it is compared as the library does (similarity ``cast``), at the same place: a
LeashLayer ``L`` checks the input of block ``L``, so direction ``L`` is read at layer ``L - 1``. Its
``condition_comparator_threshold_is: "larger"`` holds below the threshold, ``side: below`` here.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.build import build_vector
from vllm_steer.files.json_text import unique_keys
from vllm_steer.files.layer_vectors import read_layer, stack_directions
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.layers import format_layers
from vllm_steer.untrusted_text import shown

NAME = "an activation-steering file (.svec)"
CONDITION = SteerMetadata(similarity="cast")
_LARGEST = 16 * 2**20
_MOST_CONTAINERS = 100_000
_EXPECTED = 'expected a JSON object with model_type and directions {"1": [numbers], ...}'


def read(path: Path, overrides: SteerMetadata) -> VectorSteer:
    """A steer that adds direction ``L`` to the output of block ``L - 1``."""
    model, values_by_layer = _parse(path)
    directions = {
        read_layer(n): torch.tensor(v, dtype=torch.float32) for n, v in values_by_layer.items()
    }
    vectors, blocks = stack_directions({n: v for n, v in directions.items() if n > 0})
    layers = [block - 1 for block in blocks]
    if 0 in directions and overrides.layers is None:
        raise SteerError(_direction0_message(layers))
    return build_vector(vectors, layers, overrides.completed_by(SteerMetadata(base_model=model)))


def _parse(path: Path) -> tuple[str, dict[str, list[float]]]:
    """Parse and check ``model_type`` and ``directions``."""
    if path.stat().st_size > _LARGEST:
        raise SteerError(f"the JSON file has more than {_LARGEST} bytes, the limit")
    text = path.read_bytes()
    if sum(map(text.count, (b"[", b"{", b":"))) > _MOST_CONTAINERS:  # far larger in memory
        raise SteerError(
            f"the JSON file has more than {_MOST_CONTAINERS} lists, objects and keys, the limit"
        )
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys, parse_int=float)
    except SteerError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise SteerError(f"not readable as JSON ({cause(error)})") from None
    model, directions = (data.get(name) for name in ("model_type", "directions"))
    if not isinstance(model, str):
        raise SteerError(f"model_type is {shown(model)}; {_EXPECTED}")
    if not isinstance(directions, dict):
        raise SteerError(f"directions is {shown(directions)}; {_EXPECTED}")
    for layer, direction in directions.items():
        if not isinstance(direction, list) or not set(map(type, direction)) <= {float}:
            raise SteerError(f"direction {shown(layer)} is {shown(direction)}; {_EXPECTED}")
    return model, directions


def _direction0_message(layers: Sequence[int]) -> str:
    return (
        "direction 0 acts on the input of the first decoder block, which has no site. The library "
        "adds direction L to the input of block L, which is the output of block L-1: to load the "
        f"file without direction 0, give layers: {format_layers(layers)}; to steer as its "
        "behavior_layer_ids 10-15 do, give layers: 9-14"
    )
