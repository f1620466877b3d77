"""Models without weights of their own: a configuration to serve, and random steers for it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EPSILON = 1.0
STRENGTH = 5.0


@dataclass(frozen=True)
class Shape:
    """A model family's configuration and what one decode step of it has to read.

    ``read_params`` counts the parameters that every step reads once: all but tables of which
    only single rows are looked up. ``kv_size`` is the number of keys and values per token.
    """

    config: dict[str, Any]
    hidden_size: int
    layers: int
    vocab_size: int
    read_params: int
    kv_size: int


def gpt2(hidden_size: int, layers: int, heads: int, vocab_size: int = 50257) -> Shape:
    """GPT-2: tied head, learned positions; its published files name no dtype, nor does this."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": hidden_size,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "n_ctx": 1024,
        "vocab_size": vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
    }
    read = layers * 12 * hidden_size**2 + vocab_size * hidden_size
    return Shape(config, hidden_size, layers, vocab_size, read, 2 * layers * hidden_size)


def llama_8b() -> Shape:
    """Llama 3 8B: grouped queries, untied head, bfloat16."""
    hidden, inner, layers, heads, kv_heads, head_dim, vocab = 4096, 14336, 32, 32, 8, 128, 128256
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
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    read = layers * per_layer + vocab * hidden
    return Shape(config, hidden, layers, vocab, read, 2 * layers * kv_heads * head_dim)


SHAPES = {
    "tiny": gpt2(64, layers=2, heads=2, vocab_size=512),
    "gpt2-medium": gpt2(1024, layers=24, heads=16),
    "gpt2-large": gpt2(1280, layers=36, heads=20),
    "llama-8b": llama_8b(),
}


def write_model(shape: Shape, folder: Path) -> Path:
    """A model folder that ``load_format="dummy"`` can serve."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    return folder


def write_steers(shape: Shape, folder: Path, *, count: int, rank: int) -> dict[str, Path]:
    """``count`` steers ``s0``, ``s1``, ... of one free column, scaled to change rows visibly.

    With entries of deviation ``(rank * hidden_size) ** -0.25`` the product ``(c P1) P2^T`` is
    about as long as ``c``, whatever the rank; ``STRENGTH`` times that turns every next token.
    """
    from vllm_steer import LMSteer, save_steer

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    paths = {}
    for index in range(count):
        first, second = torch.randn(2, 1, shape.hidden_size, rank, generator=generator)
        scale = (rank * shape.hidden_size) ** -0.25
        steer = LMSteer(
            variant="multiply",
            epsilon=EPSILON,
            hidden_size=shape.hidden_size,
            projector1=(first * scale).bfloat16(),
            projector2=(second * scale).bfloat16(),
        )
        paths[f"s{index}"] = folder / f"s{index}.safetensors"
        save_steer(steer, paths[f"s{index}"])
    return paths


def write_vectors(shape: Shape, folder: Path) -> dict[str, Path]:
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
    """The steer config that loads them all."""
    return {
        "steers": {name: {"path": str(path)} for name, path in paths.items()},
        "limits": {"max_steers": len(paths), "max_rank": rank},
    }


def steer_bytes(shape: Shape, *, rows: int, distinct: int, rank: int, itemsize: int) -> int:
    """Bytes that steering ``rows`` rows has to move: each steer's weights once, each row twice.

    A steer's weights are two factors of ``rank``, or their product where that is smaller.
    """
    width = shape.hidden_size
    weights = min(2 * rank * width, width**2)
    return itemsize * (min(distinct, rows) * weights + 2 * rows * width)


def guidance_bytes(shape: Shape, *, rows: int, itemsize: int) -> int:
    """Bytes that guiding ``rows`` rows in every layer has to move: each row in and out in the
    model's dtype, its direction in float32.
    """
    return shape.layers * rows * shape.hidden_size * (2 * itemsize + 4)


def step_bytes(shape: Shape, *, rows: int, context: int, itemsize: int) -> int:
    """Bytes that an unsteered decode step has to read: weights once, keys and values per row."""
    return itemsize * (shape.read_params + rows * context * shape.kv_size)
