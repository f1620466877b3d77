"""The custom op in the model's graph: opaque to torch.compile, resolved by name when it runs.

A graph holds nothing but the op and the name of its place, so it is the same whatever steers are
loaded, can be saved and loaded again in another process, and finds its buffers through vLLM's
forward context as attention does.

The name is an input of the graph and not a constant in it, as the names of vLLM's own attention
layers are (``LayerName``): the graphs of equal layers are equal, and one compilation serves them
all. With a torch that has no such type (before 2.11), and where ``VLLM_USE_LAYERNAME=0``, it is a
string, and each hooked layer is compiled by itself.
"""

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

_LIBRARY = torch.library.Library("vllm_steer", "FRAGMENT")  # type: ignore[no-untyped-call]


def _steer_tokens_(
    hidden: torch.Tensor, residual: torch.Tensor | None, layer_name: LayerNameType
) -> None:
    site_layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    if not site_layer.site.is_disabled:
        site_layer.steer_(hidden, residual)


def _traced(hidden: torch.Tensor, residual: torch.Tensor | None, layer_name: LayerNameType) -> None:
    """Nothing to compute while a graph is traced: the op returns nothing."""


direct_register_custom_op(
    "steer_tokens_",
    _steer_tokens_,
    mutates_args=["hidden"],
    fake_impl=_traced,
    target_lib=_LIBRARY,
    dispatch_key="CompositeExplicitAutograd",
)

_op = torch.ops.vllm_steer.steer_tokens_.default


def steer_tokens_(hidden: torch.Tensor, residual: torch.Tensor | None, layer_name: str) -> None:
    """Steer ``hidden`` ``[tokens, width]`` in place, by the site and layer that ``layer_name``
    refers to.

    ``residual`` is the other half of the residual stream if the site needs its norm, else None.
    Traced by torch.compile together with the module whose hook calls it.
    """
    _op(hidden, residual, _encode_layer_name(layer_name))
