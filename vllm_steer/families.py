"""Where the sites are in each model family: the modules of a decoder block, by name.

The names are Hugging Face's; vLLM's own models and its Transformers backend keep them. ``stream``
says what a block of vLLM's own model returns: ``pair``, a tuple of two tensors whose sum is the
residual stream, or ``tensor``, the stream itself. Blocks of the Transformers backend and of Hugging
Face always return the stream itself.

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

    ``last_term`` names the module whose output is the last term of the stream, which the block
    adds up at its end and returns; None where it is not known to be one.
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

_PARTIAL_SUMS = "its layers return partial sums that are reduced over the ranks later"
_SCALED = "in float16 its stream is scaled by a factor that a steer does not know"
_ALTUP = "its residual stream is several streams that predict each other (AltUp)"
_LAYER_SCALAR = "each layer scales its output after the residual stream"
_HYPER = "its residual stream is several streams (hyper-connections)"

UNSUPPORTED: dict[str, str] = {
    "DeepseekForCausalLM": _SCALED,
    "DeepseekV2ForCausalLM": _SCALED,
    "DeepseekV3ForCausalLM": _SCALED,
    "DeepseekV41ForCausalLM": _HYPER,
    "DeepseekV4ForCausalLM": _HYPER,
    "Gemma3nForCausalLM": _ALTUP,
    "Gemma3nForConditionalGeneration": _ALTUP,
    "Gemma4ForCausalLM": _LAYER_SCALAR,
    "Gemma4ForConditionalGeneration": _LAYER_SCALAR,
    "MiniMaxM3SparseForCausalLM": _PARTIAL_SUMS,
    "MiniMaxM3SparseForConditionalGeneration": _PARTIAL_SUMS,
}


def family_of(architectures: Iterable[str]) -> Family:
    """The family of a model by the ``architectures`` of its config.

    Raises ``SteerError`` with the reason for one whose sites are not known.
    """
    names = list(architectures)
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    reason = next((UNSUPPORTED[name] for name in names if name in UNSUPPORTED), None)
    raise SteerError(
        f"{', '.join(names) or 'this model'} cannot be steered inside its layers: "
        f"{reason or 'where its sites are has not been tested'}; steers at the LM head work, and "
        f"these models take every steer: {', '.join(sorted(FAMILIES))}"
    )


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The one list of a model's decoder blocks: as long as the model has layers."""
    matches = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(matches) != 1:
        raise SteerError(
            f"{type(model).__name__} has {len(matches)} module lists of {num_layers} entries; "
            "expected exactly one, its decoder layers"
        )
    return matches[0]


def submodule(layer: nn.Module, name: str | None, site: str) -> Any:
    """A block's module by its name in the family; ``SteerError`` if the site is not there."""
    module = None if name is None else getattr(layer, name, None)
    if module is None:
        raise SteerError(
            f"{type(layer).__name__} has no {name or 'norm before its attention'}: the site {site} "
            "does not exist in this model"
        )
    return module
