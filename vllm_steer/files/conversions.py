"""Files of one kind that can be read as another kind, which the key ``kind`` asks for.

| file       | ``kind``    | result                                                                |
|------------|-------------|-----------------------------------------------------------------------|
| `vector`   | `condition` | the vector of one layer is what a prompt is compared to               |
| `lm_steer` | `low_rank`  | LM-Steer's transform of one column, in each of ``layers`` at ``site`` |

LM-Steer's ``c + epsilon * v * (c P1) P2^T`` is a low-rank map, ``A = epsilon * P1^T``, ``B = P2``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.applicable_keys import check_keys_apply, split_keys
from vllm_steer.files.build import build_condition, build_low_rank
from vllm_steer.files.size_limits import check_memory
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import LMSteer, LowRankSteer, Steer, VectorSteer
from vllm_steer.steers.layers import format_layers

Read = Callable[[SteerMetadata], Steer]

_FROM: Final = {"condition": "vector", "low_rank": "lm_steer"}


def converted_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds that files of ``kinds`` can be read as, beside their own."""
    found = tuple(kinds)
    return tuple(to for to, origin in _FROM.items() if origin in found and to not in found)


def read_converted(
    read: Read, overrides: SteerMetadata, *, defaults: SteerMetadata | None = None
) -> Steer:
    """Read a file as the kind ``overrides.kind``, one of ``converted_kinds``.

    ``defaults`` are the keys of the new kind that the format determines.
    """
    if overrides.kind == "condition":
        return _condition(read, overrides, defaults or SteerMetadata())
    return _low_rank(read, overrides)


def _condition(read: Read, overrides: SteerMetadata, defaults: SteerMetadata) -> Steer:
    check_keys_apply("condition", overrides)
    test, vector_keys = split_keys(overrides, "condition")
    steer = read(vector_keys)
    if not isinstance(steer, VectorSteer):
        raise SteerError(f"a steer of kind {steer.kind} cannot be read as kind: condition")
    if len(steer.layers) != 1:
        raise SteerError(
            f"it has directions of layers {format_layers(steer.layers)} and a condition reads one "
            f"layer; give the key layers, such as layers: {steer.layers[len(steer.layers) // 2]}"
        )
    from_vector = SteerMetadata(
        site=steer.site, base_model=steer.base_model, description=steer.description
    )
    metadata = test.completed_by(defaults).completed_by(from_vector)
    return build_condition(steer.vectors, steer.layers, metadata)


def _low_rank(read: Read, overrides: SteerMetadata) -> LowRankSteer:
    layers, site = overrides.layers, overrides.site
    if layers is None or site is None:
        raise SteerError(
            "an LM-Steer acts at the LM head and does not say where it acts inside the layers; "
            "with kind: low_rank give the keys layers and site, such as layers: 8-15, site: resid"
        )
    steer = read(overrides.model_copy(update={"kind": None, "layers": None, "site": None}))
    if not isinstance(steer, LMSteer) or steer.projector1 is None or steer.projector2 is None:
        variant = getattr(steer, "variant", steer.kind)
        raise SteerError(
            f"an LM-Steer of variant {variant} is no low-rank map; kind: low_rank is for multiply"
        )
    if steer.columns != 1:
        raise SteerError(
            f"it has {steer.columns} columns and a low-rank map takes one; give the key columns, "
            f"the column to keep, such as columns: [{steer.free_columns[0]}]"
        )
    check_memory(
        len(layers) * steer.projector1.nbytes * 2,
        2 * steer.projector1.nbytes,
        f"a low-rank map in {len(layers)} layers",
    )
    wide = torch.promote_types(steer.projector1.dtype, torch.float32)
    a, b = steer.epsilon * steer.projector1[0].T.to(wide), steer.projector2[0].to(wide)
    tensors = {name: _in_each(layers, matrix) for name, matrix in (("a", a), ("b", b))}
    metadata: dict[str, Any] = {
        "site": site,
        "default_strength": steer.default_strength,
        "base_model": steer.base_model,
        "description": steer.description,
    }
    return build_low_rank(tensors, layers, SteerMetadata(**metadata))


def _in_each(layers: tuple[int, ...], matrix: torch.Tensor) -> torch.Tensor:
    return matrix.expand(len(layers), -1, -1).contiguous()
