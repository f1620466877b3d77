"""Reads interventions of pyreft: low-rank maps ``h + B (A h + bias)`` of a layer.

``ReftModel.save`` writes the state dict of each intervention with ``torch.save``
(``intkey_layer_N_comp_block_output_...bin``). With the rotation ``R [hidden, rank]``:

| intervention | formula                          | ``A``         | ``B``   | ``bias``       |
|--------------|----------------------------------|---------------|---------|----------------|
| LoReFT       | ``h + R (W h + b - R^T h)``      | ``W - R^T``   | ``R``   | ``b``          |
| DiReFT       | ``h + R (W h + b)``              | ``W``         | ``R``   | ``b``          |
| NoReFT       | ``h + W2^T (W1 h + b1 - W2 h - b2)`` | ``W1 - W2`` | ``W2^T`` | ``b1 - b2`` |
| NodiReFT     | ``h + W2^T (W1 h + b1)``         | ``W1``        | ``W2^T`` | ``b1``        |
| ConsReFT     | ``h + R (b - R^T h)``            | ``-R^T``      | ``R``   | ``b``          |
| LobiReFT     | ``h + R b``                      | 0             | ``R``   | ``b``          |

LoReFT saves ``R`` itself; the others the parametrization of ``torch.nn.utils.parametrizations``
(Householder vectors times a base), from which it is computed here. NoReFT and NodiReFT, and
ConsReFT and LobiReFT, save tensors of the same names: only the folder's ``config.json`` says which
it is. No file says the activation function of ``W h + b``; the library's default, which is linear,
is assumed. Dropout acts in training only.

Source: Wu et al., NeurIPS 2024 (arXiv 2404.03592); pyreft 0.1.0, ``interventions.py``.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_low_rank
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import LowRankSteer
from vllm_steer.steers.checks import check_tensor
from vllm_steer.untrusted_text import listed, shown

NAME = "an intervention of pyreft"
METHODS: Final = ("Loreft", "Direft", "Noreft", "Nodireft", "Consreft", "Lobireft")
"""The interventions that are read, as pyreft names them."""
_ROTATION: Final = "rotate_layer"
_PARAMETRIZED: Final = "rotate_layer.parametrizations.weight"
_PROJECTION: Final = "proj_layer.weight"
_LAYOUTS: Final = (
    ({_ROTATION, "weight"}, ("Loreft",)),
    ({f"{_PARAMETRIZED}.original", "learned_source.weight"}, ("Direft",)),
    ({f"{_PARAMETRIZED}.original", "learned_source"}, ("Consreft", "Lobireft")),
    ({_PROJECTION, "learned_source.weight"}, ("Noreft", "Nodireft")),
)
"""Tensors of a state dict, and the methods that save them."""


def is_intervention(loaded: Any) -> bool:
    """True for the state dict of an intervention."""
    return isinstance(loaded, dict) and any(names <= set(loaded) for names, _ in _LAYOUTS)


def read(state: Mapping[str, Any], overrides: SteerMetadata) -> LowRankSteer:
    """The map of one file, in the layer that the key ``layers`` gives."""
    if overrides.layers is None or len(overrides.layers) != 1:
        raise SteerError(
            "one file of pyreft is the map of one layer; give the key layers, the N of its name "
            "intkey_layer_N_comp_block_output, such as layers: 15, or give the folder"
        )
    tensors = {name: tensor[None] for name, tensor in map_of(state).items()}
    metadata = overrides.model_copy(update={"layers": None})
    return build_low_rank(tensors, overrides.layers, metadata)


def map_of(state: Mapping[str, Any], method: str | None = None) -> dict[str, torch.Tensor]:
    """``a`` ``[rank, hidden]``, ``b`` ``[hidden, rank]`` and ``bias`` ``[rank]`` of a state dict.

    ``method`` is one of ``METHODS``, None if it is unknown. Raises ``SteerError`` for tensors that
    are missing or do not fit, and where several methods would be possible.
    """
    method = _method(state, method)
    if method in ("Noreft", "Nodireft"):
        projection = _tensor(state, _PROJECTION, dims=2)
        b = projection.T
    else:
        b = _rotation(state)
        projection = b.T
    rank = b.shape[1]
    a, bias = _source(state, method, b.shape)
    if method in ("Loreft", "Noreft", "Consreft"):
        a = a - projection
    if method == "Noreft" and "proj_layer.bias" in state:
        bias = bias - _sized(state, "proj_layer.bias", (rank,))
    return {"a": a, "b": b.contiguous(), "bias": bias}


def _method(state: Mapping[str, Any], method: str | None) -> str:
    methods = next((methods for names, methods in _LAYOUTS if names <= set(state)), None)
    if methods is None:
        raise SteerError(f"it has {listed(state, none='no tensors')}; expected {NAME}")
    if method is None and len(methods) > 1:
        raise SteerError(
            f"{methods[0]}Intervention and {methods[1]}Intervention save the same tensors; give "
            "the folder, whose config.json says which it is"
        )
    if method is not None and method not in methods:
        raise SteerError(
            f"its tensors are {listed(state)}, those of {methods[0]}Intervention, and config.json "
            f"says {method}Intervention"
        )
    return method or methods[0]


def _source(
    state: Mapping[str, Any], method: str, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """``W [rank, hidden]``, zero for a method without, and ``b [rank]``."""
    hidden, rank = shape
    if method in ("Consreft", "Lobireft"):
        return torch.zeros(rank, hidden), _sized(state, "learned_source", (rank,))
    prefix = "" if "weight" in state else "learned_source."
    weight = _sized(state, f"{prefix}weight", (rank, hidden))
    return weight, _sized(state, f"{prefix}bias", (rank,))


def _rotation(state: Mapping[str, Any]) -> torch.Tensor:
    """``R [hidden, rank]``, in float32 at least."""
    if _ROTATION in state:
        return _tensor(state, _ROTATION, dims=2)
    original = _tensor(state, f"{_PARAMETRIZED}.original", dims=2)
    hidden, rank = original.shape
    if rank >= hidden:
        raise SteerError(f"its rotation is {[hidden, rank]}; expected a rank below the hidden size")
    vectors = original.tril(-1)
    scales = 2 / (1 + (vectors * vectors).sum(0))
    signs = original.diagonal().trunc()
    rotation = torch.linalg.householder_product(vectors, scales) * signs
    base = _sized(state, f"{_PARAMETRIZED}.0.base", (hidden, hidden))
    return base.matmul(rotation)


def _sized(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = _tensor(state, name, dims=len(shape))
    if tuple(tensor.shape) != shape:
        raise SteerError(f"tensor {name} is {list(tensor.shape)}; expected {list(shape)}")
    return tensor


def _tensor(state: Mapping[str, Any], name: str, *, dims: int) -> torch.Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise SteerError(f"{name} is {shown(tensor)}; expected a tensor")
    check_tensor(name, tensor, dims=dims)
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
