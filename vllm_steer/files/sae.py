"""A feature of a sparse autoencoder: one row of its decoder, ``W_dec [features, hidden]``.

SAELens keeps it in ``sae_weights.safetensors``, Gemma Scope in ``params.npz``. The file does not
say where in the model the autoencoder reads; SAELens' ``cfg.json`` beside it has a ``hook_name``,
a name of TransformerLens, whose blocks are counted from 0 (``transformer_block.py``):

| hook                       | what it is              | site and layer                |
|----------------------------|-------------------------|-------------------------------|
| ``blocks.N.hook_resid_post`` | output of block ``N``   | ``resid``, layer ``N``        |
| ``blocks.N.hook_resid_pre``  | input of block ``N``    | ``resid``, layer ``N - 1``    |
| ``blocks.N.hook_attn_out``   | output of the attention | ``attn_out``, layer ``N``     |

Before block 0 nothing can be steered. Where a norm follows the attention block (Gemma 2 and 3),
TransformerLens' ``hook_attn_out`` is behind that norm and ``attn_out`` before it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files.directions import repeated
from vllm_steer.files.facts import Facts
from vllm_steer.files.make import make_vector
from vllm_steer.foreign import shown
from vllm_steer.steers import VectorSteer

NAME = "the weights of an SAE"
BIAS = "b_dec"
_HOOK = re.compile(r"blocks\.([0-9]{1,4})\.hook_(resid_post|resid_pre|attn_out)")


@dataclass(frozen=True)
class Decoder:
    """A file's decoder: its name and shape there, and how to read one row of it."""

    path: Path
    name: str
    shapes: Mapping[str, Sequence[int]]
    read_row: Callable[[Path, str, int], torch.Tensor]


def decoder_in(names: Iterable[str]) -> str | None:
    """The decoder's name among a file's tensors; None if there is none, an error if two are."""
    found = [name for name in names if name in ("W_dec", "w_dec")]
    if len(found) > 1:
        raise SteerError("it holds W_dec and w_dec; expected one decoder")
    return found[0] if found else None


def read(decoder: Decoder, facts: Facts) -> VectorSteer:
    """Add the feature's row at the hook, or at the layers and the site that the facts name."""
    features = _features(decoder)
    if facts.feature is None or facts.feature >= features:
        given = "" if facts.feature is None else f"feature {facts.feature}: "
        raise SteerError(
            f"{given}these are the weights of {features} SAE features; give feature, the number "
            f"of one, 0 to {features - 1}"
        )
    layers, site = _place(facts)
    row = decoder.read_row(decoder.path, decoder.name, facts.feature)
    known = facts.model_copy(update={"layers": None, "site": site})
    return make_vector(repeated(row, layers), layers, known)


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


def _place(facts: Facts) -> tuple[tuple[int, ...], Any]:
    if facts.hook is not None:
        if facts.layers is not None or facts.site is not None:
            raise SteerError("hook says the site and the layer; drop layers and site, or hook")
        return _of_hook(facts.hook)
    if facts.layers is None or facts.site is None:
        raise SteerError(
            "the weights of an SAE do not say where it reads; give hook, such as "
            "hook: blocks.8.hook_resid_post (cfg.json of SAELens has it as hook_name), or layers "
            "and site"
        )
    return facts.layers, facts.site


def _of_hook(hook: str) -> tuple[tuple[int, ...], str]:
    named = _HOOK.fullmatch(hook)
    if named is None:
        raise SteerError(
            f"hook is {shown(hook)}; allowed: blocks.N.hook_resid_post, blocks.N.hook_resid_pre, "
            "blocks.N.hook_attn_out: the others have no site"
        )
    block, point = int(named[1]), named[2]
    if point == "attn_out":
        return (block,), "attn_out"
    if point == "resid_pre" and block == 0:
        raise SteerError(
            f"hook is {shown(hook)}: before block 0 there is no block whose output could be steered"
        )
    return (block - 1 if point == "resid_pre" else block,), "resid"
