"""Tiny quantised Llamas, each beside a plain one with the same weights, dequantised.

The formats are written out here, from their own descriptions: GPTQ and AWQ pack eight numbers of
four bits into an int32, compressed-tensors keeps int8 or float8 weights with a scale per output.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import BLOCK, GUIDED_LAYERS, save_random

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""From a weight ``[out, in]`` to the stored tensors and the weight that they stand for."""


@dataclass(frozen=True)
class Quantised:
    """A format: its entry in the config, its tensors, and the weights that are quantised."""

    config: Mapping[str, Any]
    quantise: Quantise
    weights: str = "proj.weight"
    dtype: str = "bfloat16"


def _groups_of_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers 0 to 15 around 8, ``[in, out]``, and the scales ``[groups of inputs, out]``."""
    columns = weight.T.reshape(-1, GROUP, weight.shape[0])
    scales = (columns.abs().amax(1, keepdim=True) / 7).half().float()
    numbers = ((columns / scales).round() + 8).clamp(0, 15)
    return numbers.reshape(weight.T.shape).to(torch.int64), scales[:, 0]


def _meant(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return ((numbers - 8).float() * scales.repeat_interleave(GROUP, 0)).T.contiguous()


def _packed(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight columns of a matrix of numbers in each int32, from the lowest bits up."""
    eights = numbers.reshape(numbers.shape[0], -1, 8)[:, :, list(order)]
    words = sum(eights[:, :, bit] << (4 * bit) for bit in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales = _groups_of_4_bits(weight)
    zeros = torch.full((scales.shape[0], scales.shape[1]), 7)  # the format stores them less one
    tensors = {
        "qweight": _packed(numbers.T.contiguous()).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scales.half(),
        "g_idx": torch.arange(numbers.shape[0], dtype=torch.int32) // GROUP,
    }
    return tensors, _meant(numbers, scales)


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales = _groups_of_4_bits(weight)
    tensors = {
        "qweight": _packed(numbers, _AWQ_ORDER),
        "qzeros": _packed(torch.full_like(scales, 8, dtype=torch.int64), _AWQ_ORDER),
        "scales": scales.half(),
    }
    return tensors, _meant(numbers, scales)


def _int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def _fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def _static(quantise: Quantise, largest: float, steps: float) -> Quantise:
    """With one scale for all inputs, of a calibration whose largest input was ``largest``."""

    def with_input_scale(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors, meant = quantise(weight)
        return {**tensors, "input_scale": torch.tensor([largest / steps])}, meant

    return with_input_scale


def _compressed(number: str, quantise: Quantise) -> Quantised:
    """With a scale for each token's inputs."""
    weights = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "channel"}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    return Quantised(_scheme(number, ["Linear"], weights, inputs), quantise)


def _compressed_static(number: str, quantise: Quantise) -> Quantised:
    """With one scale for all inputs, and only at the attention's output projection."""
    weights = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "channel"}
    inputs = {**weights, "strategy": "tensor", "dynamic": False}
    targets = ["re:.*o_proj"]
    return Quantised(_scheme(number, targets, weights, inputs), quantise, "o_proj.weight")


def _scheme(
    number: str, targets: list[str], weights: dict[str, Any], inputs: dict[str, Any]
) -> dict[str, Any]:
    group = {"targets": targets, "weights": {**weights, "dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{number}-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group, "input_activations": inputs}},
    }


_BITS = {"bits": 4, "group_size": GROUP}
FORMATS = {
    "gptq": Quantised({"quant_method": "gptq", "desc_act": False, "sym": True, **_BITS}, _gptq),
    "awq": Quantised({"quant_method": "awq", "zero_point": True, "version": "gemm", **_BITS}, _awq),
    "int8": _compressed("int", _int8),
    "fp8": _compressed("float", _fp8),
    "int8-static": _compressed_static("int", _static(_int8, 8.0, 127)),
}


def save_quantised(quantised: Quantised, folder: Path) -> tuple[Path, Path]:
    """Save the quantised model and the plain one; the LM head and the embedding are plain."""
    torch.manual_seed(0)
    options = {**BLOCK, "num_hidden_layers": GUIDED_LAYERS, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(**options, head_dim=32)
    plain = save_random(transformers.LlamaForCausalLM(config), folder / "plain")
    weights = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    for name, weight in weights.items():
        if not name.endswith(quantised.weights):
            stored[name] = weight.to(getattr(torch, quantised.dtype))
            weights[name] = stored[name].float()
            continue
        tensors, weights[name] = quantised.quantise(weight)
        prefix = name.removesuffix("weight")
        stored |= {prefix + part: tensor.contiguous() for part, tensor in tensors.items()}
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    model = folder / "model"
    model.mkdir()
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    values = json.loads((plain / "config.json").read_text())
    values |= {"quantization_config": dict(quantised.config), "dtype": quantised.dtype}
    (model / "config.json").write_text(json.dumps(values))
    return model, plain
