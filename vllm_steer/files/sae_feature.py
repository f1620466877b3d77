"""Reads one feature of a sparse autoencoder with its encoder: ``kind: sae``.

The encoder's column, the decoder's row, a bias and a threshold, so that the feature is

    f(x) = p if p > threshold, else 0        p = e . x + bias

    standard: e = W_enc[:, f], bias = b_enc[f], threshold = 0 (a ReLU)
    jumprelu: e = W_enc[:, f], bias = b_enc[f], threshold = threshold[f], or exp(log_threshold[f])
    gated:    e = exp(r_mag[f]) W_enc[:, f], bias = b_mag[f],
              threshold = max(0, b_mag[f] - exp(r_mag[f]) b_gate[f])

A gated feature is active if ``W_enc[:, f] . x + b_gate[f] > 0``; its magnitude uses the same
column, so the gate is a threshold on ``p``. Where the decoder's bias is subtracted from the input
(``apply_b_dec_to_input``), ``b_dec . e`` is subtracted from ``bias`` after that. A top-k
feature depends on all other features of the token and cannot be read.

SAELens writes these facts and the hook point in ``cfg.json`` beside the weights; before version 6
at its top level, later partly under ``metadata``. Gemma Scope's ``params.npz`` has none: its
autoencoders are JumpReLU and do not subtract ``b_dec`` (its tutorial; SAELens' loader).

Source: SAELens, ``saes/standard_sae.py``, ``jumprelu_sae.py``, ``gated_sae.py``, ``sae.py``
(``process_sae_in``) and ``pretrained_sae_loaders.py`` (defaults of older files); for the gate as a
threshold Rajamanoharan et al., 2024 (arXiv 2404.16014), section 3.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files import npz_file
from vllm_steer.files.build import build_sae
from vllm_steer.files.json_text import read_json_object
from vllm_steer.files.layer_vectors import repeated
from vllm_steer.files.sae import BIAS, Weights, check_feature, layers_and_site
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import SAESteer
from vllm_steer.steers.checks import check_tensor
from vllm_steer.untrusted_text import shown

CONFIG_NAME: Final = "cfg.json"
_ARCHITECTURES: Final = ("standard", "jumprelu", "gated")
_REFUSED: Final = {
    "topk": "a top-k feature depends on all other features of the token",
    "batchtopk": "a top-k feature depends on all other features of the batch",
    "transcoder": "a transcoder reads one place and writes another",
}
_CONFIG_PARTS: Final = ("metadata", "meta")


@dataclass(frozen=True)
class _Facts:
    """What the weights do not say."""

    architecture: str
    subtracts_b_dec: bool
    hook: str | None = None
    base_model: str | None = None


def read(weights: Weights, overrides: SteerMetadata) -> SAESteer:
    """The feature at its hook point, or at the given layers and site."""
    feature = check_feature(weights, overrides)
    facts = _facts(weights, overrides)
    if (overrides.hook, overrides.layers, overrides.site) == (None, None, None):
        overrides = overrides.model_copy(update={"hook": facts.hook})
    layers, site = layers_and_site(overrides)
    _check_scale(weights, feature)
    tensors = _tensors(weights, feature, facts)
    metadata = overrides.completed_by(SteerMetadata(base_model=facts.base_model))
    metadata = metadata.model_copy(update={"layers": None, "site": site})
    rows = {name: repeated(tensor.reshape(-1), layers) for name, tensor in tensors.items()}
    numbers = {name: rows[name][:, 0].contiguous() for name in ("bias", "threshold")}
    return build_sae({**rows, **numbers}, layers, metadata)


def _tensors(weights: Weights, feature: int, facts: _Facts) -> dict[str, torch.Tensor]:
    """``encoder`` and ``decoder`` ``[hidden]``, ``bias`` and ``threshold`` ``[]``, in float32."""
    features, hidden = weights.shapes[weights.decoder]
    _check_shape(weights, _name(weights, "W_enc"), [hidden, features])
    column = weights.file.read_column(weights.path, _name(weights, "W_enc"), feature)
    decoder = weights.file.read_row(weights.path, weights.decoder, feature)
    check_tensor("W_enc", column, dims=1)
    encoder = column.double()
    threshold = torch.zeros((), dtype=torch.float64)
    if facts.architecture == "gated":
        gain = _number(weights, "r_mag", feature).exp()
        encoder, bias = gain * encoder, _number(weights, "b_mag", feature)
        threshold = (bias - gain * _number(weights, "b_gate", feature)).clamp_min(0)
    else:
        bias = _number(weights, "b_enc", feature)
    if facts.architecture == "jumprelu":
        threshold = _threshold(weights, feature)
    if facts.subtracts_b_dec:
        bias = bias - torch.dot(_vector(weights, BIAS, hidden), encoder)
    wide = torch.promote_types(decoder.dtype, torch.float32)
    tensors = {"encoder": encoder, "decoder": decoder, "bias": bias, "threshold": threshold}
    return {name: tensor.to(wide) for name, tensor in tensors.items()}


def _threshold(weights: Weights, feature: int) -> torch.Tensor:
    if "threshold" in weights.names:
        return _number(weights, "threshold", feature)
    if "log_threshold" in weights.names:
        return _number(weights, "log_threshold", feature).exp()
    raise SteerError("it has no tensor threshold, which a JumpReLU autoencoder has")


def _facts(weights: Weights, overrides: SteerMetadata) -> _Facts:
    """The facts of the keys, or else of ``cfg.json``, or else those of Gemma Scope."""
    keys = (overrides.architecture, overrides.apply_b_dec_to_input)
    facts = _Facts("jumprelu", False) if weights.file is npz_file else _config_facts(weights, keys)
    architecture = overrides.architecture or facts.architecture
    if overrides.apply_b_dec_to_input is None:
        subtracts = facts.subtracts_b_dec
    else:
        subtracts = overrides.apply_b_dec_to_input
    _check_architecture(weights, architecture)
    return _Facts(architecture, subtracts, facts.hook, facts.base_model)


def _config_facts(weights: Weights, keys: tuple[str | None, bool | None]) -> _Facts:
    path = weights.path.parent / CONFIG_NAME
    if not os.path.isfile(path):
        architecture, subtracts = keys
        if architecture is None or subtracts is None:
            raise SteerError(
                f"SAELens' {CONFIG_NAME} is not beside the file, and it says how the encoder "
                "computes a feature; copy it there, or give the keys architecture (standard, "
                "jumprelu or gated) and apply_b_dec_to_input (true or false)"
            )
        return _Facts(architecture, subtracts)
    config = read_json_object(path, CONFIG_NAME)
    config = {**_merged(config), **config}
    _check_unsupported(config)
    return _Facts(
        architecture=_of_type(config, "architecture", str, "standard"),
        subtracts_b_dec=_of_type(config, "apply_b_dec_to_input", bool, True),
        hook=_of_type(config, "hook_name", str, None) or _of_type(config, "hook_point", str, None),
        base_model=_of_type(config, "model_name", str, None),
    )


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the parts that newer versions of SAELens move metadata to."""
    parts = [config.get(name) for name in _CONFIG_PARTS]
    return {name: v for part in parts if isinstance(part, dict) for name, v in part.items()}


def _check_unsupported(config: Mapping[str, Any]) -> None:
    """Raise ``SteerError`` for an activation function or a normalisation that is not served."""
    activation = config.get("activation_fn", config.get("activation_fn_str"))
    if activation == "topk":
        raise SteerError(f"{CONFIG_NAME}: activation_fn is topk: {_REFUSED['topk']}")
    if activation not in (None, "relu"):
        raise SteerError(f"{CONFIG_NAME}: activation_fn is {shown(activation)}; expected relu")
    normalization = config.get("normalize_activations")
    if normalization not in (None, False, "none"):
        raise SteerError(
            f"{CONFIG_NAME}: normalize_activations is {shown(normalization)}; expected none: this "
            "autoencoder reads activations that are scaled first; fold the scale into its weights "
            "(SAELens: fold_activation_norm_scaling_factor)"
        )
    if config.get("reshape_activations") not in (None, "none"):
        raise SteerError(
            f"{CONFIG_NAME}: reshape_activations is {shown(config['reshape_activations'])}; "
            "expected none: an autoencoder of attention heads has no site"
        )


def _check_architecture(weights: Weights, architecture: str) -> None:
    for name, reason in _REFUSED.items():
        if name in architecture:
            raise SteerError(
                f"architecture is {shown(architecture)}: {reason}; kind: vector adds "
                "its decoder row"
            )
    if architecture not in _ARCHITECTURES:
        raise SteerError(
            f"architecture is {shown(architecture)}; allowed: {', '.join(_ARCHITECTURES)}"
        )
    gated, thresholds = {"b_gate", "r_mag", "b_mag"}, {"threshold", "log_threshold"}
    unexpected = (gated if architecture != "gated" else set()) | (
        thresholds if architecture != "jumprelu" else set()
    )
    found = sorted(unexpected & weights.names)
    if found:
        raise SteerError(
            f"architecture is {architecture} and the file has {', '.join(found)}, which such an "
            "autoencoder does not have"
        )


def _check_scale(weights: Weights, feature: int) -> None:
    """Raise ``SteerError`` for a decoder that is scaled per feature after training."""
    if "scaling_factor" not in weights.names:
        return
    scale = float(_number(weights, "scaling_factor", feature))
    if scale != 1:
        raise SteerError(
            f"scaling_factor of feature {feature} is {scale:g}; expected 1: fold it into W_dec"
        )


def _name(weights: Weights, name: str) -> str:
    """The name of a tensor in the file; Gemma Scope writes some as ``w_enc``."""
    found = [n for n in (name, name[0].lower() + name[1:]) if n in weights.names]
    if not found:
        raise SteerError(f"it has no tensor {name}, which kind: sae needs")
    return found[0]


def _number(weights: Weights, name: str, feature: int) -> torch.Tensor:
    """The feature's number in a tensor ``[features]``, float64 ``[]``."""
    _check_shape(weights, _name(weights, name), list(weights.shapes[weights.decoder][:1]))
    value = weights.file.read_row(weights.path, _name(weights, name), feature).reshape(1)
    check_tensor(name, value, dims=1)
    return value.double()[0]


def _vector(weights: Weights, name: str, width: int) -> torch.Tensor:
    """A tensor ``[width]`` in float64."""
    _check_shape(weights, _name(weights, name), [width])
    values = weights.file.read_vector(weights.path, _name(weights, name))
    check_tensor(name, values, dims=1)
    return values.double()


def _check_shape(weights: Weights, name: str, shape: list[int]) -> None:
    found = weights.file.tensor_shape(weights.path, name)
    if list(found) != shape:
        raise SteerError(f"tensor {name} is {list(found)}; expected {shape}, as {weights.decoder}")


def _of_type(config: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise SteerError(f"{CONFIG_NAME}: {name} is {shown(value)}; expected a {kind.__name__}")
    return value
