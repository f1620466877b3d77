"""Tiny models of architectures that are not in the table of families."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from reference import MODULES, Modules
from tiny_models import GUIDED_LAYERS, HIDDEN, TOKENS, VOCAB, save_random

BLOCK = {**tiny_models.BLOCK, "tie_word_embeddings": False, "num_hidden_layers": GUIDED_LAYERS}
HEADS = {**BLOCK, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {**TOKENS, "n_embd": HIDDEN, "n_head": 2, "n_layer": GUIDED_LAYERS, "n_positions": 256}
GRANITE = {
    **BLOCK,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.18,
    "logits_scaling": 2.0,
}
GRANITE_EXPERTS = {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}
FULL = ["full_attention"] * GUIDED_LAYERS
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Untested:
    """A tiny model: its classes in Transformers, its options, and where its modules are there.

    ``lacks`` are the sites that the self-test refuses.
    """

    name: str
    options: Mapping[str, Any]
    modules: Modules = field(default_factory=Modules)
    lacks: tuple[str, ...] = ()

    @property
    def config_class(self) -> str:
        stem = self.name.removesuffix("ForCausalLM")
        return {"Gemma3n": "Gemma3nText"}.get(stem, stem) + "Config"


UNTESTED = {
    model.name: model
    for model in (
        Untested("ArceeForCausalLM", HEADS),
        Untested("CohereForCausalLM", {**BLOCK, "tie_word_embeddings": True, "logit_scale": 1.0}),
        Untested(
            "Cohere2ForCausalLM",
            {**HEADS, "tie_word_embeddings": True, "logit_scale": 1.0, "sliding_window": 128},
        ),
        Untested(
            "Cohere2MoeForCausalLM",
            {
                **HEADS,
                "tie_word_embeddings": True,
                "logit_scale": 1.0,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "layer_types": FULL,
            },
        ),
        Untested("Ernie4_5ForCausalLM", HEADS),
        Untested(
            "Exaone4ForCausalLM",
            {**HEADS, "sliding_window": None, "layer_types": FULL},
            Modules(input_norm=None),
            lacks=("attn_in",),
        ),
        Untested(
            "ExaoneMoeForCausalLM",
            {
                **HEADS,
                **EXPERTS,
                "num_experts": 4,
                "num_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "sliding_window": 128,
                "layer_types": SLIDING,
            },
        ),
        Untested(
            "FalconForCausalLM",
            {
                **TOKENS,
                "hidden_size": HIDDEN,
                "num_hidden_layers": GUIDED_LAYERS,
                "num_attention_heads": 2,
                "num_kv_heads": 2,
                "new_decoder_architecture": True,
                "parallel_attn": True,
                "bias": False,
                "alibi": False,
            },
            Modules("transformer.h", "ln_attn", "self_attention", "self_attention.dense"),
        ),
        Untested(
            "GPTJForCausalLM",
            {**GPT, "rotary_dim": 16, "tie_word_embeddings": False},
            Modules("transformer.h", "ln_1", "attn", "attn.out_proj"),
        ),
        Untested("GlmForCausalLM", {**HEADS, "partial_rotary_factor": 0.5}),
        Untested("Glm4ForCausalLM", {**HEADS, "partial_rotary_factor": 0.5}),
        Untested(
            "Glm4MoeForCausalLM",
            {
                **HEADS,
                **EXPERTS,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "partial_rotary_factor": 0.5,
            },
        ),
        Untested(
            "GptOssForCausalLM",
            {
                **HEADS,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 128,
                "layer_types": FULL,
            },
        ),
        Untested("GraniteForCausalLM", GRANITE),
        Untested("GraniteMoeForCausalLM", GRANITE_EXPERTS),
        Untested(
            "GraniteMoeHybridForCausalLM",
            {
                **GRANITE_EXPERTS,
                "shared_intermediate_size": 64,
                "layer_types": ["attention"] * GUIDED_LAYERS,
                "mamba_n_heads": 4,
                "mamba_d_head": 32,
            },
        ),
        Untested(
            "GraniteMoeSharedForCausalLM", {**GRANITE_EXPERTS, "shared_intermediate_size": 64}
        ),
        Untested(
            "GraniteMoeSWAForCausalLM",
            {**GRANITE_EXPERTS, "shared_intermediate_size": 64, "sliding_window": 128},
        ),
        Untested("GraniteSWAForCausalLM", {**GRANITE, "sliding_window": 128}),
        Untested("HunYuanDenseV1ForCausalLM", HEADS),
        Untested("HyperCLOVAXForCausalLM", HEADS),
        Untested("Ministral3ForCausalLM", {**HEADS, "sliding_window": None}),
        Untested("NemotronForCausalLM", {**HEADS, "partial_rotary_factor": 0.5}),
        Untested(
            "OPTForCausalLM",
            {
                **TOKENS,
                "hidden_size": HIDDEN,
                "ffn_dim": 96,
                "num_hidden_layers": GUIDED_LAYERS,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
                "word_embed_proj_dim": HIDDEN,
            },
            Modules(
                "model.decoder.layers", "self_attn_layer_norm", "self_attn", "self_attn.out_proj"
            ),
        ),
        Untested("OlmoeForCausalLM", {**BLOCK, "num_experts": 4, "num_experts_per_tok": 2}),
        Untested(
            "Olmo3ForCausalLM",
            {**BLOCK, "sliding_window": 128, "layer_types": FULL},
            Modules(input_norm=None),
            lacks=("attn_in",),
        ),
        Untested("SeedOssForCausalLM", HEADS),
        Untested("SmolLM3ForCausalLM", BLOCK),
        Untested("StableLmForCausalLM", {**BLOCK, "partial_rotary_factor": 0.5}),
        Untested("Starcoder2ForCausalLM", {**BLOCK, "sliding_window": None}),
    )
}
MODULES |= {name: model.modules for name, model in UNTESTED.items()}


def save_untested(model: Untested, folder: Path) -> Path:
    """Save a model whose weights are large enough for next-token choices to differ."""
    torch.manual_seed(0)
    config = getattr(transformers, model.config_class)(**model.options)
    return save_random(getattr(transformers, model.name)(config), folder)


POST_NORM = Untested(
    "OPTForCausalLM", {**UNTESTED["OPTForCausalLM"].options, "do_layer_norm_before": False}
)
ALTERNATING_UPDATES = Untested(
    "Gemma3nForCausalLM",
    {
        **{**HEADS, "tie_word_embeddings": True, "intermediate_size": [96] * 4},
        "num_hidden_layers": 4,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "sliding_window": 128,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "activation_sparsity_pattern": [0.0] * 4,
    },
)
SCALED_IN_FLOAT16 = Untested(
    "DeepseekV2ForCausalLM",
    {
        **BLOCK,
        **EXPERTS,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": GUIDED_LAYERS,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.0,
        "topk_method": "greedy",
    },
)
