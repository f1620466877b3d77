"""Concept vectors of concept-guidance: a safetensors file of a probe per layer, no metadata.

``W [layers, hidden]``, ``b [layers]`` and, for probes with a slope, ``a [layers, 1]``. Row ``l`` is
layer ``l``, counted from 0: the layer whose input norm's output it is rotated by. The authors' code
uses ``W`` as it is, so this does; the sign of a PCA probe is arbitrary per layer, and
``orient: true`` multiplies each row by the sign of its ``a``, towards the concept.

Source: von Ruette et al., ICML 2024 (arXiv 2402.14433), their repository's ``concepts.py`` (files)
and ``patching.py`` (use).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_vector
from vllm_steer.files.safetensors_file import read_tensors
from vllm_steer.steers import VectorSteer
from vllm_steer.steers.checks import check_tensor
from vllm_steer.steers.layers import format_layers

NAME = "a concept-guidance file"
_FOUND = Facts(site="attn_in", mode="rotate")


def fits(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a file's tensors are a probe per layer."""
    if set(shapes) not in ({"W", "b"}, {"W", "a", "b"}) or len(shapes["W"]) != 2:
        return False
    layers = shapes["W"][0]
    return all(list(shape) in ([layers], [layers, 1]) for n, shape in shapes.items() if n != "W")


def read(path: Path, facts: Facts) -> VectorSteer:
    """Rotate at the input norm's output, by the rows of ``W`` or by the oriented ones."""
    tensors = read_tensors(path)
    vectors = tensors["W"]
    check_tensor("W", vectors, dims=2)
    if facts.orient:  # in float64, where every dtype can be multiplied
        vectors = (vectors.double() * _signs(tensors)).to(vectors.dtype)
    return make_vector(vectors, range(len(vectors)), facts.over(_FOUND))


def _signs(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "a" not in tensors:
        raise SteerError(
            "orient needs the tensor a, which this file lacks (a logistic probe already points to "
            "the concept); drop the key"
        )
    slopes = tensors["a"]
    check_tensor("a", slopes, dims=slopes.ndim)
    signs = slopes.double().reshape(-1, 1).sign()
    unclear = [layer for layer, sign in enumerate(signs) if sign.abs() != 1]
    if unclear:
        raise SteerError(
            f"orient: tensor a has no sign for layer {format_layers(unclear)}; drop the key, or "
            "keep other layers in a file of your own"
        )
    return signs
