"""Reads one feature of a sparse autoencoder: a row of its decoder, ``W_dec [features, hidden]``.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.build import build_vector
from vllm_steer.files.layer_vectors import repeated
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import VectorSteer
from vllm_steer.untrusted_text import shown

NAME = "the weights of an SAE"
BIAS = "b_dec"
_HOOK = re.compile(r"blocks\.([0-9]{1,4})\.hook_(resid_post|resid_pre|attn_out)")


@dataclass(frozen=True)
class Decoder:
    """The decoder in a file: its tensor name, all shapes, and a function that reads one row."""

    path: Path
    name: str
    shapes: Mapping[str, Sequence[int]]
    read_row: Callable[[Path, str, int], torch.Tensor]


def decoder_name(names: Iterable[str]) -> str | None:
    """The name of the decoder tensor, None if there is none; ``SteerError`` for two."""
    matches = [name for name in names if name in ("W_dec", "w_dec")]
    if len(matches) > 1:
        raise SteerError("it has both W_dec and w_dec; expected one decoder")
    return matches[0] if matches else None


def read(decoder: Decoder, overrides: SteerMetadata) -> VectorSteer:
    """A steer that adds the feature's row at its hook point, or at the given layers and site."""
    features = _features(decoder)
    if overrides.feature is None or overrides.feature >= features:
        prefix = "" if overrides.feature is None else f"feature {overrides.feature}: "
        raise SteerError(
            f"{prefix}the SAE has {features} features; give the key feature, a number from 0 to "
            f"{features - 1}"
        )
    layers, site = _layers_and_site(overrides)
    row = decoder.read_row(decoder.path, decoder.name, overrides.feature)
    metadata = overrides.model_copy(update={"layers": None, "site": site})
    return build_vector(repeated(row, layers), layers, metadata)


def _features(decoder: Decoder) -> int:
    shape, bias = list(decoder.shapes[decoder.name]), decoder.shapes.get(BIAS)
    if len(shape) != 2 or min(shape) < 1:
        raise SteerError(f"tensor {decoder.name} is {shape}; expected [features, hidden]")
    if bias is not None and list(bias) != shape[1:]:
        raise SteerError(
            f"tensor {decoder.name} is {shape} and {BIAS} {list(bias)}; expected [features, "
            "hidden] and [hidden]; transpose the decoder"
        )
    return shape[0]


def _layers_and_site(overrides: SteerMetadata) -> tuple[tuple[int, ...], Any]:
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
