"""The custom op in the model's graph: opaque to torch.compile, resolved by name when it runs.

A graph holds nothing but the op and the name of its place, so it is the same whatever steers are
loaded, can be saved and loaded again in another process, and finds its buffers through vLLM's
forward context as attention does.
"""

import torch
from vllm.forward_context import get_forward_context

_LIBRARY = torch.library.Library("vllm_steer", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("steer_tokens_(Tensor(a!) hidden, Tensor? residual, str place) -> ()")  # type: ignore[no-untyped-call]


def _steer_tokens_(hidden: torch.Tensor, residual: torch.Tensor | None, place: str) -> None:
    steered = get_forward_context().no_compile_layers[place]
    if not steered.site.resting:
        steered.steer_(hidden, residual)


def _traced(hidden: torch.Tensor, residual: torch.Tensor | None, place: str) -> None:
    """Nothing to compute while a graph is traced: the op returns nothing."""


_LIBRARY.impl("steer_tokens_", _steer_tokens_, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("vllm_steer::steer_tokens_", _traced, lib=_LIBRARY)

steer_tokens_ = torch.ops.vllm_steer.steer_tokens_.default
