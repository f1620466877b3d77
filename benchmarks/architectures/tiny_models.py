"""Tiny random models of any architecture of Transformers, from its config's own defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

LAYERS: Final = 3
HIDDEN: Final = 64
VOCAB: Final = 500
_SMALL: Final[Mapping[str, Any]] = {
    **{"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **{"hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "word_embed_proj_dim": HIDDEN},
    **{"intermediate_size": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "intermediate_size_mlp": 96},
    **{"num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS},
    **{"num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2},
    **{"num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 32, "global_head_dim": 32},
    **{"max_position_embeddings": 256, "n_positions": 256, "sliding_window": 128},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"shared_intermediate_size": 64, "n_group": 1, "topk_group": 1, "num_expert_groups": 1},
    **{"first_k_dense_replace": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1},
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
    **{"qk_head_dim": 48, "v_head_dim": 32, "rotary_dim": 16, "index_head_dim": 32},
    **{"index_n_heads": 2, "index_topk": 64, "attention_chunk_size": 128},
    **{"query_pre_attn_scalar": 32, "laurel_rank": 8, "num_kv_shared_layers": 0},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 32, "linear_value_head_dim": 32, "conv_dim": HIDDEN},
    **{"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_n_groups": 1},
    **{"mamba_d_state": 16, "mamba_expand": 1, "mamba_num_heads": 2, "mamba_head_dim": 32},
    **{"state_size": 16, "ssm_state_size": 16, "time_step_rank": 4, "mamba_dt_rank": 4},
    **{"conv_kernel": 4, "expand": 2, "n_groups": 1, "num_logits_to_keep": 1},
    **{"num_nextn_predict_layers": 0, "rope_head_dim": 16},
    **{"audio_token_id": 8, "image_token_id": 7, "image_token_index": 7, "video_token_id": 9},
    **{"vision_start_token_id": 5, "vision_end_token_id": 6, "boi_token_index": 5},
    **{"eoi_token_index": 6, "boi_token_id": 5, "eoi_token_id": 6, "audio_token_index": 8},
}
_PER_LAYER: Final = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
_PARTS: Final = ("text_config", "vision_config", "audio_config", "encoder_config", "qformer_config")
_VISION: Final[Mapping[str, Any]] = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1},
    **{"num_attention_heads": 2, "num_heads": 2, "head_dim": 32, "image_size": 28},
    **{"patch_size": 14, "embed_dim": 64, "out_hidden_size": HIDDEN, "num_layers": 1},
    **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
}


_OTHERWISE: Final[Mapping[str, Mapping[str, Any]]] = {
    # What vLLM runs on a CPU: no expert layers of its own for latent attention, one expert a token.
    "DeepseekV2ForCausalLM": {"first_k_dense_replace": LAYERS, "q_lora_rank": None},
    # As many lists of the model's modules as there are layers would be taken for the layers.
    "Gemma3nForCausalLM": {"altup_num_inputs": 3},
    "Llama4ForCausalLM": {"num_experts_per_tok": 1},
    "Llama4ForConditionalGeneration": {"num_experts_per_tok": 1},
    # What vLLM reads and the config of Transformers does not set.
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1},
    "AfmoeForCausalLM": {"score_func": "sigmoid"},
    "Lfm2ForCausalLM": {
        **{"block_dim": HIDDEN, "block_ff_dim": 96, "block_multiple_of": 32},
        **{"block_auto_adjust_ff_dim": False, "block_ffn_dim_multiplier": 1.0},
    },
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16},
}
"""By architecture, what its config takes in place of the common sizes, or beside them."""


def config_of(architecture: str) -> Any:
    """A small config of an architecture; ``LookupError`` if Transformers does not have it."""
    model_class = getattr(transformers, architecture, None)
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        raise LookupError(f"Transformers has no {architecture}")
    config = _shrunk(config_class(), _SMALL, _OTHERWISE.get(architecture, {}))
    config.architectures = [architecture]
    return config


def _shrunk(config: Any, sizes: Mapping[str, Any], otherwise: Mapping[str, Any]) -> Any:
    """A config of the same class with small sizes, made by its own constructor."""
    values = config.to_dict()
    small = {name: sizes[name] for name in sizes if values.get(name) is not None}
    if "num_key_value_heads" in values:
        small["num_key_value_heads"] = 2
    if not isinstance(getattr(type(config), "head_dim", None), property):
        small["head_dim"] = sizes["head_dim"]
    if isinstance(values.get("intermediate_size"), list):
        small["intermediate_size"] = [sizes["intermediate_size"]] * LAYERS
    if values.get("activation_sparsity_pattern") is not None:
        small["activation_sparsity_pattern"] = [0.0] * LAYERS
    for name in _PER_LAYER:
        if isinstance(values.get(name), list):
            kinds = list(dict.fromkeys(values[name]))
            small[name] = (kinds * LAYERS)[:LAYERS]
    parts = [name for name in _PARTS if hasattr(getattr(config, name, None), "to_dict")]
    for name in parts:
        is_text = name == "text_config"
        part_sizes = _SMALL if is_text else _VISION
        part = _shrunk(getattr(config, name), part_sizes, otherwise if is_text else {})
        small[name] = part.to_dict()
    if "text_config" not in parts:
        small |= otherwise
    dropped = ("architectures", "transformers_version", "model_type", "rope_scaling")
    kept = {name: value for name, value in values.items() if name not in (*dropped, *small)}
    return type(config)(**{**kept, **small})


def save_tiny_model(architecture: str, folder: Path) -> Any:
    """Save a tiny model with random weights; return it. Errors are those of Transformers."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config_of(architecture)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                embeds = "embed" in name or "wte" in name
                parameter.normal_(0, 0.5 if "head" in name or embeds else 0.15)
    model.save_pretrained(folder)
    return model
