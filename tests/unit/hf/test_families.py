"""The table of model families: known and refused models, reasons, and the position of blocks."""

from typing import Any, get_args

import pytest
from torch import nn

from vllm_steer import SteerError
from vllm_steer.families import (
    FAMILIES,
    UNSUPPORTED,
    BlockOutput,
    Family,
    decoder_layers,
    family_of,
    submodule,
)

EXPECTED = {
    "LlamaForCausalLM": Family("input_layernorm", "self_attn", "o_proj", "pair"),
    "GPT2LMHeadModel": Family("ln_1", "attn", "c_proj", "tensor", "mlp"),
    "GPTNeoXForCausalLM": Family("input_layernorm", "attention", "dense", "tensor", "mlp"),
    "PhiForCausalLM": Family("input_layernorm", "self_attn", "dense", "tensor", "mlp"),
    "Olmo2ForCausalLM": Family(None, "self_attn", "o_proj", "tensor"),
    "Gemma2ForCausalLM": Family("input_layernorm", "self_attn", "o_proj", "pair"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_known_model_has_its_own_names(name: str) -> None:
    assert family_of([name]) == EXPECTED[name]
    assert family_of(iter(["Unknown", name])) == EXPECTED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_complete_and_not_refused(name: str) -> None:
    family = family_of([name])
    assert family.stream in get_args(BlockOutput)
    assert family.attention and family.projection
    assert name not in UNSUPPORTED


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_known_to_fail_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(SteerError) as caught:
        family_of([name])
    assert str(caught.value).startswith(
        f"{name} cannot be steered inside its layers: {UNSUPPORTED[name]}; steers at the LM head "
        "work, and these models were compared with Hugging Face: ArceeForCausalLM, Cohere2For"
    )


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["BloomForCausalLM"], "^BloomForCausalLM cannot .*: where its sites are has not been"),
        (["A", "B"], "^A, B cannot be steered inside its layers: where its sites are"),
        (["A", "DeepseekV4ForCausalLM"], "^A, DeepseekV4ForCausalLM cannot .*: its residual str"),
        ([], "^this model cannot be steered inside its layers: where its sites are"),
        (["llamaforcausallm"], "^llamaforcausallm cannot"),
    ],
    ids=str,
)
def test_an_unknown_model_is_refused(architectures: list[str], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        family_of(architectures)


@pytest.mark.parametrize("name", [*FAMILIES, *UNSUPPORTED])
def test_every_name_is_one_that_vllm_knows(name: str) -> None:
    """A name that is misspelt here would refuse a model that works, or serve one that does not."""
    from vllm.model_executor.models.registry import ModelRegistry

    assert name in ModelRegistry.get_supported_archs()


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(1, 1) for _ in range(count))


def model_of(**lists: nn.ModuleList) -> nn.Module:
    model = nn.Module()
    model.inner = nn.Module()
    for name, modules in lists.items():
        setattr(model.inner, name, modules)
    return model


def test_the_blocks_are_the_one_list_as_long_as_the_model_is_deep() -> None:
    layers = blocks(3)
    assert decoder_layers(model_of(layers=layers, others=blocks(2)), 3) is layers


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({}, "has 0 module lists of 3 entries; expected exactly one, its decoder layers"),
        ({"layers": blocks(2)}, "Module has 0 module lists of 3 entries"),
        ({"text": blocks(3), "vision": blocks(3)}, "Module has 2 module lists of 3 entries"),
    ],
    ids=["none", "shorter", "two"],
)
def test_a_model_with_ambiguous_decoder_blocks_is_refused(lists: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        decoder_layers(model_of(**lists), 3)


def test_a_list_that_is_found_twice_is_one_list() -> None:
    layers = blocks(3)
    assert decoder_layers(model_of(layers=layers, again=layers), 3) is layers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o_proj", "Module has no o_proj: the site heads does not exist in this model"),
        (None, "Module has no norm before its attention: the site heads does not exist"),
    ],
)
def test_a_missing_module_is_named(name: str | None, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        submodule(nn.Module(), name, "heads")


def test_a_module_is_found_by_its_name() -> None:
    block = nn.Module()
    block.norm = nn.Identity()
    assert submodule(block, "norm", "attn_in") is block.norm
