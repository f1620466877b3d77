"""Reads concept vectors of concept-guidance: safetensors with one probe per layer, no metadata.

``W [layers, hidden]``, ``b [layers]`` and, for probes with a slope, ``a [layers, 1]``. Row ``l``
belongs to layer ``l``, counted from 0; it rotates the output of that layer's input norm. The
authors' code uses ``W`` unchanged, and so does this reader. The sign of a PCA probe is arbitrary
per layer; ``orient: true`` multiplies each row by the sign of its ``a``, so that it points to the
concept.

Source: von Ruette et al., ICML 2024 (arXiv 2402.14433), their repository's ``concepts.py`` (files)
and ``patching.py`` (use).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_vector
from vllm_steer.files.safetensors_file import read_tensors
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.checks import check_tensor
from vllm_steer.steers.layers import format_layers

NAME = "a concept-guidance file"
_FILE_METADATA = SteerMetadata(site="attn_in", mode="rotate")


def is_concept_guidance(shapes: Mapping[str, Sequence[int]]) -> bool:
    """True if the tensors are one probe per layer."""
    if set(shapes) not in ({"W", "b"}, {"W", "a", "b"}) or len(shapes["W"]) != 2:
        return False
    layers = shapes["W"][0]
    return all(list(shape) in ([layers], [layers, 1]) for n, shape in shapes.items() if n != "W")


def read(path: Path, overrides: SteerMetadata) -> VectorSteer:
    """A steer that rotates the input norm's output towards the rows of ``W``."""
    tensors = read_tensors(path)
    vectors = tensors["W"]
    check_tensor("W", vectors, dims=2)
    if overrides.orient:  # in float64, where every dtype can be multiplied
        vectors = (vectors.double() * _signs(tensors)).to(vectors.dtype)
    return build_vector(vectors, range(len(vectors)), overrides.completed_by(_FILE_METADATA))


def _signs(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "a" not in tensors:
        raise SteerError(
            "orient needs the tensor a, and the file has none (a logistic probe already points "
            "to the concept); remove the key"
        )
    slopes = tensors["a"]
    check_tensor("a", slopes, dims=slopes.ndim)
    signs = slopes.double().reshape(-1, 1).sign()
    unclear = [layer for layer, sign in enumerate(signs) if sign.abs() != 1]
    if unclear:
        raise SteerError(
            f"orient: tensor a has no sign for layer {format_layers(unclear)}; remove the key, or "
            "save a file without these layers"
        )
    return signs
