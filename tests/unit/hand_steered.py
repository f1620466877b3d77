"""A tiny Llama in float64 whose tokens are changed by plain functions, for tests of ``hf``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers

VOCAB, HIDDEN, LAYERS = 31, 8, 3
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [9, 2, 6, 5, 3, 5, 8]])
SITES = {
    "resid": "model.layers.{}",
    "attn_in": "model.layers.{}.input_layernorm",
    "attn_out": "model.layers.{}.self_attn",
}
Act = Callable[[torch.Tensor, int], torch.Tensor]
"""What happens to ``x [width]`` at one position."""


@cache
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval().requires_grad_(False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


@contextmanager
def by_hand(acts: Mapping[tuple[str, int], Act]) -> Iterator[Any]:
    """The model with each token of some sites and layers passed through a function."""
    model, handles = llama(), []

    def hook_of(act: Act) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            rows = [torch.stack([act(row[t], t) for t in range(len(row))]) for row in x]
            changed = torch.stack(rows)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        return hook

    for (site, layer), act in acts.items():
        module = model.get_submodule(SITES[site].format(layer))
        handles.append(module.register_forward_hook(hook_of(act)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
