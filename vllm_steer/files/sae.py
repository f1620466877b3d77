"""Reads one feature of a sparse autoencoder: a row of its decoder, ``W_dec [features, hidden]``.

The feature with its encoder (``kind: sae``) is read by ``sae_feature``.

SAELens stores the decoder in ``sae_weights.safetensors``, Gemma Scope in ``params.npz``. The file
does not contain the autoencoder's hook point; SAELens' ``cfg.json`` beside it does (``hook_name``),
as a name of TransformerLens, which counts blocks from 0 (``transformer_block.py``):

| hook                       | activation              | site and layer                |
|----------------------------|-------------------------|-------------------------------|
| ``blocks.N.hook_resid_post`` | output of block ``N``   | ``resid``, layer ``N``        |
| ``blocks.N.hook_resid_pre``  | input of block ``N``    | ``resid``, layer ``N - 1``    |
| ``blocks.N.hook_attn_out``   | output of the attention | ``attn_out``, layer ``N``     |

The input of block 0 has no site. Where a norm follows the attention block (Gemma 2 and 3),
TransformerLens' ``hook_attn_out`` is after that norm and ``attn_out`` before it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_vector
from vllm_steer.files.layer_vectors import repeated
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import VectorSteer
from vllm_steer.untrusted_text import shown

NAME = "the weights of an SAE"
BIAS = "b_dec"
ENCODER_KEYS = ("architecture", "apply_b_dec_to_input")
KEYS = ("feature", "hook", *ENCODER_KEYS)
"""The keys of ``FORMAT_KEYS`` that apply to the weights of an SAE."""
_HOOK = re.compile(r"blocks\.([0-9]{1,4})\.hook_(resid_post|resid_pre|attn_out)")


class TensorFile(Protocol):
    """Reads single tensors of a file: ``safetensors_file`` or ``npz_file``."""

    def tensor_shape(self, path: Path, name: str) -> list[int]: ...

    def read_row(self, path: Path, name: str, row: int) -> torch.Tensor: ...

    def read_vector(self, path: Path, name: str) -> torch.Tensor: ...

    def read_column(self, path: Path, name: str, column: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Weights:
    """The weights in a file: the decoder's name, some shapes, all names, and what reads them."""

    path: Path
    decoder: str
    shapes: Mapping[str, Sequence[int]]
    names: frozenset[str]
    file: TensorFile


def decoder_name(names: Iterable[str]) -> str | None:
    """The name of the decoder tensor, None if there is none; ``SteerError`` for two."""
    matches = [name for name in names if name in ("W_dec", "w_dec")]
    if len(matches) > 1:
        raise SteerError("it has both W_dec and w_dec; expected one decoder")
    return matches[0] if matches else None


def read(weights: Weights, overrides: SteerMetadata) -> VectorSteer:
    """A steer that adds the feature's row at its hook point, or at the given layers and site."""
    given = [name for name in ENCODER_KEYS if getattr(overrides, name) is not None]
    if given:
        raise SteerError(
            f"{', '.join(given)} says how the encoder computes a feature and does not apply to its "
            "decoder row alone; remove the key, or give kind: sae"
        )
    feature = check_feature(weights, overrides)
    layers, site = layers_and_site(overrides)
    row = weights.file.read_row(weights.path, weights.decoder, feature)
    metadata = overrides.model_copy(update={"layers": None, "site": site})
    return build_vector(repeated(row, layers), layers, metadata)


def check_feature(weights: Weights, overrides: SteerMetadata) -> int:
    """The number of the feature; ``SteerError`` for one that the autoencoder does not have."""
    features = _features(weights)
    if overrides.feature is None or overrides.feature >= features:
        prefix = "" if overrides.feature is None else f"feature {overrides.feature}: "
        raise SteerError(
            f"{prefix}the SAE has {features} features; give the key feature, a number from 0 to "
            f"{features - 1}"
        )
    return overrides.feature


def _features(weights: Weights) -> int:
    shape, bias = list(weights.shapes[weights.decoder]), weights.shapes.get(BIAS)
    if len(shape) != 2 or min(shape) < 1:
        raise SteerError(f"tensor {weights.decoder} is {shape}; expected [features, hidden]")
    if bias is not None and list(bias) != shape[1:]:
        raise SteerError(
            f"tensor {weights.decoder} is {shape} and {BIAS} {list(bias)}; expected [features, "
            "hidden] and [hidden]; transpose the decoder"
        )
    return shape[0]


def layers_and_site(overrides: SteerMetadata) -> tuple[tuple[int, ...], Any]:
    """The layers and the site of the key ``hook``, or those given."""
    if overrides.hook is not None:
        if overrides.layers is not None or overrides.site is not None:
            raise SteerError(
                "hook determines site and layers; remove layers and site, or remove hook"
            )
        return _of_hook(overrides.hook)
    if overrides.layers is None or overrides.site is None:
        raise SteerError(
            "SAE weights do not contain the hook point; give the key hook, such as "
            "hook: blocks.8.hook_resid_post (hook_name in SAELens' cfg.json), or give layers and "
            "site"
        )
    return overrides.layers, overrides.site


def _of_hook(hook: str) -> tuple[tuple[int, ...], str]:
    match = _HOOK.fullmatch(hook)
    if match is None:
        raise SteerError(
            f"hook is {shown(hook)}; allowed: blocks.N.hook_resid_post, blocks.N.hook_resid_pre, "
            "blocks.N.hook_attn_out; other hook points have no site"
        )
    block, point = int(match[1]), match[2]
    if point == "attn_out":
        return (block,), "attn_out"
    if point == "resid_pre" and block == 0:
        raise SteerError(
            f"hook is {shown(hook)}: the input of block 0 cannot be steered; the first one is "
            "blocks.1.hook_resid_pre"
        )
    return (block - 1 if point == "resid_pre" else block,), "resid"
