"""Tiny models with random weights, one per way a head can work, saved in Hugging Face layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN = 64
VOCAB = 500

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
_GPT_LIKE = {**_COMMON, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 256}


def _llama() -> Any:
    config = transformers.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT_LIKE))


def _gemma2_soft_cap_tied() -> Any:
    config = transformers.Gemma2Config(
        **_LLAMA_LIKE,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=None,
        query_pre_attn_scalar=32,
        sliding_window=256,
    )
    return transformers.Gemma2ForCausalLM(config)


def _gpt_neox_transformers_backend() -> Any:
    config = transformers.GPTNeoXConfig(
        **_COMMON,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return transformers.GPTNeoXForCausalLM(config)


def _gpt_j_head_bias() -> Any:
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**_GPT_LIKE, rotary_dim=16))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def _granite_logit_scale() -> Any:
    config = transformers.GraniteConfig(
        **{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
        logits_scaling=3.0,
        attention_multiplier=32**-0.5,
    )
    return transformers.GraniteForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gemma2-soft-cap-tied": _gemma2_soft_cap_tied,
    "gpt-neox-transformers-backend": _gpt_neox_transformers_backend,
    "gpt-j-head-bias": _gpt_j_head_bias,
    "granite-logit-scale": _granite_logit_scale,
}


def save_tiny_model(family: str, folder: Path) -> Path:
    """Save a model whose weights are large enough for next-token choices to differ."""
    torch.manual_seed(0)
    model = FAMILIES[family]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 0.5 if "embed" in name or "wte" in name or "head" in name else 0.15
                parameter.normal_(0, scale)
    model.save_pretrained(folder)
    return folder
