"""A tiny random Llama in float64 with the embedded tokenizer, for tests of fitting."""

from functools import cache
from typing import Any

import torch
import transformers

from vllm_steer.embedded import MODEL

LAYERS, HIDDEN = 3, 16


@cache
def tiny_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@cache
def tiny_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval().requires_grad_(False)


def norm_outputs(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    """The output of a layer's input norm for the residual stream before the layer, ``[tokens,
    width]``.
    """
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        outputs: torch.Tensor = model.model.layers[layer].input_layernorm(states[layer])
    return outputs[0]
