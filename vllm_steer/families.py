"""Where the sites are in each model family: the modules of a decoder block, by name.

The tables have the models that were compared with Hugging Face, with the names of its modules. An
engine does not read names from here: its self-test finds them in vLLM's own model. ``stream`` says
what a block of that model returns: ``pair``, a tuple of two tensors whose sum is the residual
stream, or ``tensor``, the stream itself. Blocks of Hugging Face return the stream itself.

| site       | where                                    | what is changed                       |
|------------|------------------------------------------|---------------------------------------|
| `resid`    | output of the block                      | the stream, in a pair's first tensor  |
| `attn_in`  | output of ``input_norm``                 | its first tensor; the stream is kept  |
| `attn_out` | output of ``attention``                  | its first tensor                      |
| `heads`    | input of ``projection`` in ``attention`` | the heads side by side                |

What is only added at `resid` may as well be added to ``last_term`` before the block adds that to
the stream: a compiler then keeps the sum and the norm that follows it in one kernel.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vllm_steer.errors import SteerError

BlockOutput = Literal["pair", "tensor"]


@dataclass(frozen=True)
class Family:
    """Names inside one decoder block, and how a block of vLLM's own model returns the stream.

    A name may give two, of which a block has one: ``ln_attn or input_layernorm``. ``last_term``
    names the module whose output is the last term of the stream, which the block adds up at its end
    and returns; None where it is not known to be one.
    """

    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    projection: str = "o_proj"
    stream: BlockOutput = "pair"
    last_term: str | None = None


_LLAMA = Family()
_GPT2 = Family("ln_1", "attn", "c_proj", stream="tensor", last_term="mlp")
_NEOX = Family(attention="attention", projection="dense", stream="tensor", last_term="mlp")
_PHI = Family(projection="dense", stream="tensor", last_term="mlp")
_OLMO = Family(stream="tensor", last_term="mlp")
_POST_NORM = Family(input_norm=None, stream="tensor")

FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _NEOX,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _POST_NORM,
    "OlmoForCausalLM": _OLMO,
    "Phi3ForCausalLM": _LLAMA,
    "PhiForCausalLM": _PHI,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA,
}

SELF_TESTED: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("ArceeForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
            *("CohereForCausalLM", "Ernie4_5ForCausalLM", "ExaoneMoeForCausalLM"),
            *("Glm4ForCausalLM", "Glm4MoeForCausalLM", "GlmForCausalLM", "GptOssForCausalLM"),
            *("GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM"),
            *("GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteSWAForCausalLM"),
            *("HunYuanDenseV1ForCausalLM", "HyperCLOVAXForCausalLM"),
            *("Ministral3ForCausalLM", "NemotronForCausalLM", "OlmoeForCausalLM"),
            *("SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM"),
            "Starcoder2ForCausalLM",
            *("Gemma3ForConditionalGeneration", "Llama4ForConditionalGeneration"),
            *("Mistral3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
            "Qwen3VLForConditionalGeneration",
        ),
        _LLAMA,
    ),
    "Exaone4ForCausalLM": _POST_NORM,
    "FalconForCausalLM": Family("ln_attn or input_layernorm", "self_attention", "dense"),
    "GPTJForCausalLM": Family("ln_1", "attn", "out_proj"),
    "OPTForCausalLM": Family("self_attn_layer_norm", "self_attn", "out_proj"),
    "Olmo3ForCausalLM": _POST_NORM,
}
"""Models that were compared with Hugging Face, whose sites an engine finds by its self-test.

The names are those of Hugging Face's modules; what a block of vLLM returns is found too.
"""

NOT_TESTED = "where its sites are has not been tested"
_PARTIAL_SUMS = "its layers return partial sums that are reduced over the ranks later"
_HYPER = "its residual stream is several streams (hyper-connections)"

UNSUPPORTED: dict[str, str] = {
    "DeepseekV41ForCausalLM": _HYPER,
    "DeepseekV4ForCausalLM": _HYPER,
    "MiniMaxM3SparseForCausalLM": _PARTIAL_SUMS,
    "MiniMaxM3SparseForConditionalGeneration": _PARTIAL_SUMS,
}


LAYER_SCALES = frozenset({"Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"})
"""Each layer multiplies the residual stream by a number of its own, in Hugging Face too."""


def check_supported(architectures: Iterable[str]) -> None:
    """Raise ``SteerError`` with the reason for a model that is known not to work."""
    names = list(architectures)
    if any(name in UNSUPPORTED for name in names):
        family_of(names)


def is_compared(architectures: Iterable[str]) -> bool:
    """Whether a model of this class was compared with Hugging Face."""
    return any(name in FAMILIES or name in SELF_TESTED for name in architectures)


def family_of(architectures: Iterable[str]) -> Family:
    """The family of a model by the ``architectures`` of its config.

    Raises ``SteerError`` with the reason for one whose sites are not known.
    """
    names = list(architectures)
    for name in names:
        if name in FAMILIES or name in SELF_TESTED:
            return {**FAMILIES, **SELF_TESTED}[name]
    reason = next((UNSUPPORTED[name] for name in names if name in UNSUPPORTED), None)
    raise SteerError(
        f"{', '.join(names) or 'this model'} cannot be steered inside its layers: "
        f"{reason or NOT_TESTED}; steers at the LM head work, and "
        f"these models were compared with Hugging Face: "
        f"{', '.join(sorted({**FAMILIES, **SELF_TESTED}))}"
    )


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of a model's decoder blocks: as long as the model has layers.

    In vLLM's own models the module that owns it has a ``start_layer`` and an ``end_layer``, the
    bounds of the pipeline stage; elsewhere it is the one list of that length.
    """
    language = language_model(model)
    lists = [m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    owned = {
        id(child)
        for module in language.modules()
        if _is_stage(module)
        for child in module.children()
    }
    matches = [one for one in lists if id(one) in owned] or lists
    if len(matches) != 1:
        raise SteerError(
            f"{type(model).__name__} has {len(matches)} module lists of {num_layers} entries; "
            "expected exactly one, its decoder layers"
        )
    return matches[0]


def language_model(model: nn.Module) -> nn.Module:
    """The language model inside a multimodal one; other models are returned as they are."""
    if callable(get := getattr(model, "get_language_model", None)):
        inner: nn.Module = get()
        return inner
    for owner in (model, getattr(model, "model", None)):
        if isinstance(inside := getattr(owner, "language_model", None), nn.Module):
            return inside
    return model


def _is_stage(module: nn.Module) -> bool:
    bounds = (getattr(module, name, None) for name in ("start_layer", "end_layer"))
    return all(isinstance(bound, int) for bound in bounds)


def _inside(layer: nn.Module, path: str) -> Any:
    module: Any = layer if path else None
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def submodule(layer: nn.Module, name: str | None, site: str) -> Any:
    """A block's module by its name in the family; ``SteerError`` if the site is not there."""
    module = next(
        (m for n in (name or "").split(" or ") if (m := _inside(layer, n)) is not None), None
    )
    if module is None:
        raise SteerError(
            f"{type(layer).__name__} has no {name or 'norm before its attention'}: the site {site} "
            "does not exist in this model"
        )
    return module
