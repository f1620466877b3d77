"""One random checkpoint that vLLM, Hugging Face and the peers all serve, and steers for it.

vLLM's ``load_format="dummy"`` would do for the timing, but its weights exist in vLLM only; with
real files the peers' outputs can be compared.
"""

from pathlib import Path

import torch
from dummy_model import SHAPES, Shape, write_model, write_steers, write_vectors

LLAMA = "-as-llama"


def llama_name(name: str) -> str:
    """The name of the Llama of a shape's size: its own, if it is a Llama."""
    return name if SHAPES[name].config["model_type"] == "llama" else name + LLAMA


def shape_named(name: str) -> Shape:
    """A shape of ``dummy_model`` or the Llama of its size."""
    shape = SHAPES[name.removesuffix(LLAMA)]
    return llama_like(shape) if name.endswith(LLAMA) else shape


def llama_like(shape: Shape) -> Shape:
    """A Llama of a GPT-2's width, depth, heads, vocabulary and (nearly) parameters, head tied.

    For peers that know no GPT-2.
    """
    heads, width = shape.config["n_head"], shape.hidden_size
    inner = -(-8 * width // 3 // 64) * 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": shape.vocab_size - 1,
        "eos_token_id": shape.vocab_size - 1,
    }
    read = shape.layers * (4 * width**2 + 3 * width * inner) + shape.vocab_size * width
    return Shape(config, width, shape.layers, shape.vocab_size, read, shape.kv_size)


def write_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype) -> Path:
    """A model folder with weights as Hugging Face initialises the architecture, in ``dtype``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write_model(shape, folder))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def write_all_steers(shape: Shape, folder: Path, rank: int) -> Path:
    """Files of vllm-steer: LM-Steers ``s0`` and ``s1`` of ``rank``, ``guided`` with a vector for
    every layer; and these vectors as a plain tensor ``[layers, hidden_size]`` in ``guided.pt``.
    """
    from vllm_steer import load_steer

    write_steers(shape, folder, count=2, rank=rank)
    paths = write_vectors(shape, folder)
    torch.save(load_steer(paths["guided"]).vectors, folder / "guided.pt")
    return folder
