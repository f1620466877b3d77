"""Each model family has the sites that the table says, on Hugging Face's own models."""

from typing import Any

import pytest
import torch
import transformers

from vllm_steer import DeltaSteer, SteerError, hf
from vllm_steer.families import FAMILIES, family_of
from vllm_steer.hf import sites

VOCAB, HIDDEN, LAYERS, HEAD = 29, 8, 2, 6
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 12,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
EXTRA: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": HEAD, "query_pre_attn_scalar": HEAD},
    "Gemma3": {"head_dim": HEAD, "query_pre_attn_scalar": HEAD},
    "Gemma": {"head_dim": HEAD},
    "GPT2": {"num_key_value_heads": None},
    "Llama": {"head_dim": HEAD},
    "Mistral": {"head_dim": HEAD},
    "Mixtral": {"num_local_experts": 2},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 6},
    "Qwen3": {"head_dim": HEAD},
    "Qwen3Moe": EXPERTS | {"head_dim": HEAD},
}


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    stem = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(stem, f"{stem}Config"))
    config = config_class(**SIZES | EXTRA.get(stem, {}))
    return getattr(transformers, architecture)(config).eval()


def sites_of(architecture: str) -> list[str]:
    has_norm = FAMILIES[architecture].input_norm is not None
    return ["resid", "attn_out", "heads", *(["attn_in"] if has_norm else [])]


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_each_site_has_the_position_and_width_of_the_table(
    architecture: str,
) -> None:
    model = model_of(architecture)
    names, layers = sites.family(model), sites.layers_of(model)
    assert names is family_of([architecture])
    for site in sites_of(architecture):
        activations: list[torch.Tensor] = []
        hook = sites.attach(
            layers[1], names, site, lambda x, activations=activations: activations.append(x) or x
        )
        model(TOKENS)
        hook.remove()
        assert activations[0].shape == (1, 7, sites.site_width(model, layers[1], names, site))


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_each_site_can_be_steered_from_a_position_on(architecture: str) -> None:
    model = model_of(architecture)
    names, layers = sites.family(model), sites.layers_of(model)
    plain = model(TOKENS).logits
    for site in sites_of(architecture):
        width = sites.site_width(model, layers[1], names, site)
        steer = DeltaSteer(delta=torch.ones(2, 1, width), layers=(1,), site=site)
        with hf.steered(model, {"delta": 50.0}, {"delta": steer}, prompt_length=5):
            result = model(TOKENS).logits
        same = (result == plain).all(-1)[0].tolist()
        # attn_in changes keys and values too, so later tokens see it; at the others each token
        # of the last layer is changed for itself.
        assert same[:4] == [True] * 4
        assert same[4:6] == [False, False]
        assert same[6] == (site != "attn_in")


def test_a_family_without_an_input_norm_refuses_that_site() -> None:
    model = model_of("Olmo2ForCausalLM")
    with pytest.raises(SteerError, match="has no norm before its attention: the site attn_in"):
        sites.site_module(sites.layers_of(model)[0], sites.family(model), "attn_in")
