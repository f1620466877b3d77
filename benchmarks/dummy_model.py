"""Models with random or no weights, random steers for them, and the minimum memory traffic of both.

Every input is read once and every output written once; ``itemsize`` is that of the model's dtype.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EPSILON = 1.0
STRENGTH = 5.0


@dataclass(frozen=True)
class ModelShape:
    """A model family's configuration and the data that one decode step reads.

    ``read_params`` counts the parameters that every step reads once: all except tables in which
    only single rows are looked up. ``kv_size`` is the number of keys and values per token.
    """

    config: dict[str, Any]
    hidden_size: int
    layers: int
    vocab_size: int
    read_params: int
    kv_size: int


def gpt2(hidden: int, layers: int, heads: int, vocab: int = 50257) -> ModelShape:
    """GPT-2: tied head, learned positions; without a dtype, as in its published files."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": vocab,
        "bos_token_id": vocab - 1,
        "eos_token_id": vocab - 1,
    }
    num_weights = layers * 12 * hidden**2 + vocab * hidden
    return ModelShape(config, hidden, layers, vocab, num_weights, 2 * layers * hidden)


def llama(
    hidden: int, inner: int, layers: int, heads: int, vocab: int, kv_heads: int = 0, **changes: Any
) -> ModelShape:
    """Llama, its head tied unless ``changes`` of the configuration say otherwise."""
    kv_heads, head_dim = kv_heads or heads, hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "bos_token_id": vocab - 1,
        "eos_token_id": vocab - 1,
    }
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    num_weights, kv_size = layers * per_layer + vocab * hidden, 2 * layers * kv_heads * head_dim
    return ModelShape(config | changes, hidden, layers, vocab, num_weights, kv_size)


LLAMA_3 = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "tiny": gpt2(64, layers=2, heads=2, vocab=512),
    "gpt2-medium": gpt2(1024, layers=24, heads=16),
    "llama-8b": llama(4096, 14336, 32, 32, 128256, kv_heads=8, **LLAMA_3),
    # Width, depth and (nearly) the parameters of the GPT-2, for peers that do not support GPT-2.
    "tiny-as-llama": llama(64, 192, 2, 2, 512),
    "gpt2-medium-as-llama": llama(1024, 2752, 24, 16, 50257),
}


def write_model(shape: ModelShape, folder: Path) -> Path:
    """Write a model folder that ``load_format="dummy"`` can serve."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    return folder


def write_checkpoint(
    shape: ModelShape, folder: Path, dtype: torch.dtype, *, norm: float | None = None
) -> Path:
    """Write a model folder with the weights of Hugging Face's initialisation, for engines that must
    agree with each other. ``norm``: the weights of a Llama's last norm.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write_model(shape, folder))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if norm is not None:
        model.model.norm.weight.data.fill_(norm)
    model.save_pretrained(folder)
    return folder


def random_lm_steer(width: int, rank: int, epsilon: float, generator: torch.Generator) -> Any:
    """A steer of one free column. Entries with standard deviation ``(rank * width) ** -0.25`` give
    ``(c P1) P2^T`` about the length of ``c``, for any rank.
    """
    from vllm_steer import LMSteer

    first, second = torch.randn(2, 1, width, rank, generator=generator) * (rank * width) ** -0.25
    return LMSteer(
        variant="multiply", epsilon=epsilon, hidden_size=width, projector1=first, projector2=second
    )


def write_steers(shape: ModelShape, folder: Path, *, count: int, rank: int) -> dict[str, Path]:
    """``count`` LM-Steers ``s0``, ``s1``, ...; one of them at ``STRENGTH`` changes every next
    token.
    """
    from vllm_steer import save_steer

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    paths = {f"s{index}": folder / f"s{index}.safetensors" for index in range(count)}
    for path in paths.values():
        save_steer(random_lm_steer(shape.hidden_size, rank, EPSILON, generator), path)
    return paths


def write_vectors(shape: ModelShape, folder: Path) -> dict[str, Path]:
    """A steer of all layers for each figure of guidance: ``guided`` adds, ``rotated`` rotates."""
    from vllm_steer import VectorSteer, save_steer

    generator = torch.Generator().manual_seed(1)
    paths = {}
    for name, mode in (("guided", "add"), ("rotated", "rotate")):
        vectors = torch.randn(shape.layers, shape.hidden_size, generator=generator)
        steer = VectorSteer(vectors=vectors, layers=tuple(range(shape.layers)), mode=mode)
        paths[name] = folder / f"{name}.safetensors"
        save_steer(steer, paths[name])
    return paths


def steer_config(paths: dict[str, Path], rank: int) -> dict[str, Any]:
    """The steer config with all of them."""
    return {
        "steers": {name: {"path": str(path)} for name, path in paths.items()},
        "limits": {"max_steers": len(paths), "max_rank": rank},
    }


def weight_elements(width: int, rank: int) -> int:
    """The number of weights of one LM-Steer in the bank."""
    return min(2 * width * rank, width * width)


def lm_steer_bytes(width: int, *, rank: int, rows: int, distinct: int, itemsize: int) -> int:
    """Bytes of ``rows`` rows, read and written, with ``distinct`` steers, each read once."""
    return itemsize * (distinct * weight_elements(width, rank) + 2 * rows * width)


def guided_step_bytes(shape: ModelShape, *, rows: int, itemsize: int) -> int:
    """Bytes to guide ``rows`` rows in every layer: rows in and out, directions in float32."""
    return shape.layers * rows * shape.hidden_size * (2 * itemsize + 4)


def step_bytes(shape: ModelShape, *, rows: int, context: int, itemsize: int) -> int:
    """Bytes of an unsteered decode step: weights once, keys and values per row."""
    return itemsize * (shape.read_params + rows * context * shape.kv_size)
