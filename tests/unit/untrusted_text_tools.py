"""How other tools write their files, and where their code puts the vectors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from vllm_steer import VectorSteer

WIDTH, BLOCKS = 6, 5


def directions(layers: Iterable[int]) -> dict[int, np.ndarray]:
    """A random vector by layer."""
    generator = np.random.default_rng(1)
    return {layer: generator.normal(size=WIDTH).astype(np.float32) for layer in layers}


def make_blocks() -> list[nn.Module]:
    """A stack of small blocks, no two alike."""
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)]


def streams(
    *, into: Mapping[int, np.ndarray] | None = None, out_of: Mapping[int, np.ndarray] | None = None
) -> list[torch.Tensor]:
    """The embeddings and the stream behind each block, with vectors added to blocks' inputs or
    outputs: what Transformers calls hidden states.
    """
    residual_streams = [torch.linspace(-1, 1, WIDTH)]
    for number, block in enumerate(make_blocks()):
        stream = residual_streams[-1]
        if into and number in into:
            stream = stream + torch.from_numpy(into[number])
        stream = stream + block(stream)
        if out_of and number in out_of:
            stream = stream + torch.from_numpy(out_of[number])
        residual_streams.append(stream)
    return residual_streams


def steered(steer: VectorSteer) -> torch.Tensor:
    """The last stream with a steer at its layers' outputs."""
    assert (steer.site, steer.mode) == ("resid", "add")
    by_layer = zip(steer.layers, steer.vectors, strict=True)
    return streams(out_of={layer: vector.numpy() for layer, vector in by_layer})[-1]


SIGNED = torch.tensor([[0.5], [-2.0], [1.0], [-0.001]])


def write_concept(path: Path, **tensors: torch.Tensor) -> Path:
    whole = {"W": torch.randn(4, WIDTH), "b": torch.zeros(4), **tensors}
    save_file(whole, str(path))
    return path


def write_gguf(
    path: Path, vectors: Mapping[Any, np.ndarray], *, architecture: str = "controlvector"
) -> Path:
    """As repeng's ``export_gguf`` does."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "mistral")
    writer.add_uint32(f"{architecture}.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_svec(path: Path, vectors: Mapping[int, np.ndarray], **fields: Any) -> Path:
    """As the library's ``SteeringVector.save`` does."""
    data = {
        "model_type": "llama",
        "directions": {layer: vector.tolist() for layer, vector in vectors.items()},
        "explained_variances": dict.fromkeys(vectors, 0.5),
        **fields,
    }
    path.write_text(json.dumps(data))
    return path


DECODER = np.arange(48.0, dtype=np.float32).reshape(8, WIDTH)


def write_saelens(path: Path, decoder: torch.Tensor | None = None, **tensors: torch.Tensor) -> Path:
    weights = {
        "W_enc": torch.zeros(WIDTH, 8),
        "W_dec": torch.from_numpy(DECODER) if decoder is None else decoder,
        "b_enc": torch.zeros(8),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file({**weights, **tensors}, str(path))
    return path


def write_npz(path: Path, decoder: np.ndarray = DECODER, *, save: Any = np.savez) -> Path:
    with path.open("wb") as file:
        save(file, W_enc=np.zeros((WIDTH, 8)), W_dec=decoder, threshold=np.zeros(8))
    return path
