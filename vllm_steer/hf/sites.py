"""The sites inside a decoder block of a Hugging Face model: where to read and to change."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_steer.errors import SteerError
from vllm_steer.families import Family, family_of, submodule
from vllm_steer.hf.language_model import architectures_of, layers_of, text_config

__all__ = [
    "attach",
    "check_layers_exist",
    "family",
    "layers_of",
    "site_module",
    "site_width",
    "widened",
]

Act = Callable[[torch.Tensor], torch.Tensor]


def family(model: Any) -> Family:
    """Where the sites of a model are; ``SteerError`` for an architecture that is not known."""
    if getattr(text_config(model), "do_layer_norm_before", True) is False:
        raise SteerError(
            f"{type(model).__name__} cannot be steered inside its layers: with "
            "do_layer_norm_before: false they normalise the residual stream itself (post-norm)"
        )
    return family_of(architectures_of(model))


def attach(layer: nn.Module, names: Family, site: str, act: Act) -> RemovableHandle:
    """Pass what is at a site of one block, ``[batch, tokens, width]``, through ``act`` from now on.

    Raises ``SteerError`` if the block does not have the site.
    """
    module = site_module(layer, names, site)
    if site == "heads":
        return module.register_forward_pre_hook(lambda _, args: (act(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _module, _args, output: _first(output, act))


def site_module(layer: nn.Module, names: Family, site: str) -> nn.Module:
    """The module whose output is the site; for ``heads`` the one whose input it is."""
    if site == "resid":
        return layer
    if site == "attn_in":
        return _module(layer, names.input_norm, site)
    attention = _module(layer, names.attention, site)
    return attention if site == "attn_out" else _module(attention, names.projection, site)


def site_width(model: Any, layer: nn.Module, names: Family, site: str) -> int:
    """The last size of the tensor at a site."""
    module = site_module(layer, names, site)
    if site != "heads":
        return int(text_config(model).hidden_size)
    # GPT-2's projection is a Conv1D, whose weight is [in, out].
    width = getattr(module, "in_features", None) or module.weight.shape[0]  # type: ignore[index]
    return int(width)


def check_layers_exist(layers: tuple[int, ...], num_layers: int) -> None:
    """Raise ``SteerError`` for a layer that a model of ``num_layers`` does not have."""
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise SteerError(
            f"layer {', '.join(map(str, beyond))} does not exist: this model has layers 0 to "
            f"{num_layers - 1}"
        )


def widened(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype of the sums: float32, float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _module(parent: nn.Module, name: str | None, site: str) -> nn.Module:
    module: nn.Module = submodule(parent, name, site)
    return module


def _first(output: Any, act: Act) -> Any:
    """The output with its first tensor passed through ``act``."""
    return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)
