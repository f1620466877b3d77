"""Tiny models with random weights, saved in Hugging Face layout.

``FAMILIES`` has one per way a head can work, ``GUIDED_FAMILIES`` one per way a decoder block can
be built. Heads are 32 wide: vLLM's attention on a CPU supports no smaller heads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN = 64
VOCAB = 500
GUIDED_LAYERS = 3

TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK = {
    **TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA_LIKE = {**BLOCK, "head_dim": 32}
_UNTIED = {"tie_word_embeddings": False}
_GPT_LIKE = {**TOKENS, "n_embd": HIDDEN, "n_head": 2, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

Build = Callable[[int], Any]


def _llama(num_layers: int) -> Any:
    config = transformers.LlamaConfig(**_LLAMA_LIKE, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.LlamaForCausalLM(config)


def _gpt2(num_layers: int) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT_LIKE, n_layer=num_layers))


def _gemma2_soft_cap_tied(num_layers: int, *, soft_cap: float = 2.0) -> Any:
    config = transformers.Gemma2Config(
        **_LLAMA_LIKE,
        num_hidden_layers=num_layers,
        final_logit_softcapping=soft_cap,
        attn_logit_softcapping=None,
        query_pre_attn_scalar=32,
        sliding_window=256,
    )
    return transformers.Gemma2ForCausalLM(config)


def _gpt_neox_transformers_backend(num_layers: int) -> Any:
    config = transformers.GPTNeoXConfig(
        **TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return transformers.GPTNeoXForCausalLM(config)


def _gpt_j_head_bias(num_layers: int) -> Any:
    config = transformers.GPTJConfig(**_GPT_LIKE, n_layer=num_layers, rotary_dim=16)
    model = transformers.GPTJForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def _granite_logit_scale(num_layers: int) -> Any:
    config = transformers.GraniteConfig(
        **BLOCK,
        num_hidden_layers=num_layers,
        logits_scaling=3.0,
        attention_multiplier=32**-0.5,
    )
    return transformers.GraniteForCausalLM(config)


def _mistral(num_layers: int) -> Any:
    config = transformers.MistralConfig(
        **_LLAMA_LIKE, **_UNTIED, num_hidden_layers=num_layers, sliding_window=None
    )
    return transformers.MistralForCausalLM(config)


def _qwen2(num_layers: int) -> Any:
    config = transformers.Qwen2Config(**BLOCK, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.Qwen2ForCausalLM(config)


def _qwen3(num_layers: int) -> Any:
    config = transformers.Qwen3Config(**_LLAMA_LIKE, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.Qwen3ForCausalLM(config)


def _qwen3_heads_wider_than_hidden(num_layers: int) -> Any:
    config = transformers.Qwen3Config(
        **{**_LLAMA_LIKE, "num_attention_heads": 4}, **_UNTIED, num_hidden_layers=num_layers
    )
    return transformers.Qwen3ForCausalLM(config)


def _gemma(num_layers: int) -> Any:
    config = transformers.GemmaConfig(**_LLAMA_LIKE, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.GemmaForCausalLM(config)


def _gemma2(num_layers: int) -> Any:
    model = _gemma2_soft_cap_tied(num_layers, soft_cap=5.0)
    # A final norm of random signs: the tied head then finds no likeness of the last token.
    torch.nn.init.normal_(model.model.norm.weight, mean=-1.0, std=4.0)
    return model


def _gemma3(num_layers: int) -> Any:
    config = transformers.Gemma3TextConfig(
        **_LLAMA_LIKE,
        **_UNTIED,
        num_hidden_layers=num_layers,
        query_pre_attn_scalar=32,
        sliding_window=256,
        layer_types=(["sliding_attention", "full_attention"] * num_layers)[:num_layers],
    )
    return transformers.Gemma3ForCausalLM(config)


def _phi3(num_layers: int) -> Any:
    config = transformers.Phi3Config(**BLOCK, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.Phi3ForCausalLM(config)


def _mixtral(num_layers: int) -> Any:
    config = transformers.MixtralConfig(
        **_LLAMA_LIKE,
        **_UNTIED,
        num_hidden_layers=num_layers,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return transformers.MixtralForCausalLM(config)


def _qwen2_moe(num_layers: int) -> Any:
    config = transformers.Qwen2MoeConfig(
        **BLOCK,
        **_UNTIED,
        **_EXPERTS,
        num_hidden_layers=num_layers,
        shared_expert_intermediate_size=32,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _qwen3_moe(num_layers: int) -> Any:
    config = transformers.Qwen3MoeConfig(
        **_LLAMA_LIKE, **_UNTIED, **_EXPERTS, num_hidden_layers=num_layers
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _phi(num_layers: int) -> Any:
    sizes = {**BLOCK, "intermediate_size": 4 * HIDDEN}  # all that vLLM's own Phi knows
    config = transformers.PhiConfig(**sizes, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.PhiForCausalLM(config)


def _olmo(num_layers: int) -> Any:
    config = transformers.OlmoConfig(**BLOCK, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.OlmoForCausalLM(config)


def _olmo2_no_input_norm(num_layers: int) -> Any:
    config = transformers.Olmo2Config(**BLOCK, **_UNTIED, num_hidden_layers=num_layers)
    return transformers.Olmo2ForCausalLM(config)


FAMILIES: dict[str, Build] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gemma2-soft-cap-tied": _gemma2_soft_cap_tied,
    "gpt-neox-transformers-backend": _gpt_neox_transformers_backend,
    "gpt-j-head-bias": _gpt_j_head_bias,
    "granite-logit-scale": _granite_logit_scale,
}

GUIDED_FAMILIES: dict[str, Build] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gpt-neox-transformers-backend": _gpt_neox_transformers_backend,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3-heads-wider-than-hidden": _qwen3_heads_wider_than_hidden,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "qwen3-moe": _qwen3_moe,
    "phi-transformers-backend": _phi,
    "olmo-transformers-backend": _olmo,
    "olmo2-no-input-norm": _olmo2_no_input_norm,
}

# Gemma scales its embedding up: were it as large, every token would be followed by itself.
_SMALL_EMBEDDING = {"gemma", "gemma2", "gemma3"}


def save_tiny_model(family: str, folder: Path, *, num_layers: int = 2) -> Path:
    """Save a model whose weights are large enough for next-token choices to differ."""
    torch.manual_seed(0)
    model = {**FAMILIES, **GUIDED_FAMILIES}[family](num_layers)
    return save_random(model, folder, embedding=0.06 if family in _SMALL_EMBEDDING else 0.5)


def save_random(model: Any, folder: Path, *, embedding: float = 0.5) -> Path:
    """Give a model random weights by the kind of matrix, and save it in float32."""
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, _scale(name, embedding))
    model.save_pretrained(folder)
    return folder


def heads_width(family: str) -> int:
    """Width of all heads of a family side by side, the input of the attention's projection."""
    return 2 * HIDDEN if family == "qwen3-heads-wider-than-hidden" else HIDDEN


def _scale(name: str, embedding: float) -> float:
    if "head" in name or "embed_out" in name:
        return 0.5
    return embedding if "embed" in name or "wte" in name else 0.15
