"""Vectors of IBM's activation-steering: JSON with ``directions: {"L": [...]}`` (``.svec``).

The library wraps block ``L`` (from 0) in a LeashLayer, which adds direction ``L`` to the block's
*input* before the block runs (``leash_layer.py``, ``forward``). That is the output of block
``L - 1``, so direction ``L`` is a steer of layer ``L - 1`` at ``resid`` here; to steer as its
``behavior_layer_ids`` 10 to 15 do, keep ``layers: 9-14``. (The direction itself was taken from
``hidden_states[L + 1]``, the output of block ``L``, by ``steering_vector.py``; where it acts is
what counts.) Direction 0 acts on the embeddings, before any block, and cannot be served.

A condition vector of the same library looks the same in a file; it is not meant to be added.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError

from vllm_steer.errors import SteerError
from vllm_steer.files.directions import read_layer, stack_directions
from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_vector
from vllm_steer.foreign import LONGEST, printable
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.layers import format_layers

NAME = "an activation-steering file (.svec)"
_LARGEST = 64 * 2**20


class _Svec(BaseModel):
    model_type: str
    directions: dict[str, list[Annotated[float, Field(strict=True)]]]
    explained_variances: Any = None


def read(path: Path, facts: Facts) -> VectorSteer:
    """Add at the output of the block before each direction's."""
    found = _parse(path)
    directions = {read_layer(n): torch.tensor(v) for n, v in found.directions.items()}
    vectors, blocks = stack_directions({n: v for n, v in directions.items() if n > 0})
    layers = [block - 1 for block in blocks]
    if 0 in directions and facts.layers is None:
        raise SteerError(_choose(layers))
    return make_vector(vectors, layers, facts.over(Facts(base_model=found.model_type)))


def _parse(path: Path) -> _Svec:
    if path.stat().st_size > _LARGEST:
        raise SteerError(f"a JSON file of more than {_LARGEST} bytes is not read")
    try:
        return _Svec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        if wrong["type"] == "json_invalid":
            raise SteerError(f"not readable as JSON ({printable(wrong['msg'], LONGEST)})") from None
        place = printable(".".join(map(str, wrong["loc"])), LONGEST)
        raise SteerError(
            f"{place}: {wrong['msg']}; wanted: a JSON object with model_type and "
            'directions {"1": [numbers], ...}'
        ) from None


def _choose(layers: Sequence[int]) -> str:
    return (
        "its direction 0 acts before the first decoder block, where nothing can be steered here. "
        "The library adds direction L to the input of block L, which is the output of block L-1: "
        f"to do without direction 0, give layers: {format_layers(layers)}; to steer as its "
        "behavior_layer_ids 10-15 do, give layers: 9-14"
    )
