"""Hugging Face causal language models for fitting, inspection and evaluation."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_steer import embedded
from vllm_steer.errors import SteerError, cause
from vllm_steer.hf.language_model import auto_class

EMBEDDED = "embedded"
"""The name of the model that is part of the package."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model with its tokenizer, and its name."""

    name: str
    model: Any
    tokenizer: Any


def model_path(name: str) -> str:
    """The path of a model: the folder of the embedded model, else the name as given."""
    return str(embedded.MODEL) if name == EMBEDDED else name


def load_language_model(
    name: str, *, dtype: str = "auto", device: str | None = None
) -> LanguageModel:
    """Load a model in evaluation mode, without gradients.

    ``name`` is a folder, a hub id or ``embedded``; ``dtype`` is the name of a torch dtype, or
    ``auto`` for the checkpoint's; ``device`` None selects a GPU if there is one. Remote code of a
    model is never executed. Raises ``SteerError`` if the model, dtype or device does not exist.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch_device = _device(device)
    tokenizer = load_tokenizer(name)
    try:
        auto = auto_class(AutoConfig.from_pretrained(model_path(name)))
        model = auto.from_pretrained(model_path(name), dtype=dtype)
    except (OSError, ValueError, AttributeError, KeyError, ImportError) as error:
        raise SteerError(f"model {name}: cannot be loaded ({cause(error)})") from error
    model = model.to(torch_device).eval().requires_grad_(False)
    return LanguageModel(name, model, tokenizer)


def _device(requested: str | None) -> torch.device:
    name = requested or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        raise SteerError(f"device {name}: cannot be used ({cause(error)})") from error
    if device.type == "meta":
        raise SteerError(f"device {name}: holds no values; give cpu or cuda")
    return device


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer. Raises ``SteerError`` if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError, AttributeError, KeyError, ImportError) as error:
        raise SteerError(f"model {name}: no tokenizer can be loaded ({cause(error)})") from error
