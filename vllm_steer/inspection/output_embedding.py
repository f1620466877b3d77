"""Reads a model's output embedding: one tensor of the checkpoint, not the whole model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_steer.errors import SteerError, cause
from vllm_steer.hf.language_model import auto_class
from vllm_steer.models import load_language_model, model_path

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_output_embedding(name: str) -> torch.Tensor:
    """``E [vocab, hidden_size]``, the weight of the LM head, in the checkpoint's dtype.

    ``name`` is a folder, a hub id or ``embedded``. If the checkpoint does not have the tensor in a
    readable form (another file format, a quantised head), the whole model is loaded.

    Raises ``SteerError`` if the model does not exist or has no LM head.
    """
    skeleton = _skeleton(name)
    head = skeleton.get_output_embeddings()
    if head is None:
        raise SteerError(f"model {name}: {type(skeleton).__name__} has no LM head to read")
    names = _names(skeleton, head.weight)
    embedding = _read(model_path(name), names, tuple(head.weight.shape))
    if embedding is None:
        embedding = load_language_model(name, device="cpu").model.get_output_embeddings().weight
    return embedding.detach()


def _skeleton(name: str) -> Any:
    """The model without its weights."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(name))
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise SteerError(f"model {name}: cannot be loaded ({cause(error)})") from error


def _names(skeleton: Any, weight: torch.Tensor) -> list[str]:
    """The possible names of the head's weight in a checkpoint.

    A tied head has the names of the input embedding. Some checkpoints, such as GPT-2's, omit the
    prefix of the base model.
    """
    tied = skeleton.get_input_embeddings().weight is weight
    owner = skeleton.get_input_embeddings().weight if tied else weight
    names = [n for n, p in skeleton.named_parameters(remove_duplicate=False) if p is owner]
    prefix = f"{skeleton.base_model_prefix}."
    return [*names, *(name.removeprefix(prefix) for name in names if name.startswith(prefix))]


def _read(folder: str, names: list[str], shape: tuple[int, ...]) -> torch.Tensor | None:
    """The tensor under the first name that the checkpoint has; None if it has none of them."""
    for path in _files(folder, names):
        with safe_open(str(path), framework="pt") as file:
            for name in names:
                if name in file.keys():  # noqa: SIM118
                    tensor: torch.Tensor = file.get_tensor(name)
                    fits = tuple(tensor.shape) == shape and tensor.is_floating_point()
                    return tensor if fits else None
    return None


def _files(folder: str, names: list[str]) -> list[Path]:
    """The safetensors files of a checkpoint that may have one of the names."""
    whole = _cached(folder, _ONE_FILE)
    if whole is not None:
        return [whole]
    index = _cached(folder, _INDEX)
    if index is None:
        return []
    shard_of_tensor = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = {shard_of_tensor[name]: None for name in names if name in shard_of_tensor}
    return [path for shard in shards if (path := _cached(folder, shard)) is not None]


def _cached(folder: str, file: str) -> Path | None:
    """A checkpoint's file, downloaded if it is not cached; None if the checkpoint has none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(folder, file)
    except OSError:
        return None
    return None if path is None else Path(path)
