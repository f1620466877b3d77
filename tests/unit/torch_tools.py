"""What tests of files of ``torch.save`` share."""

from pathlib import Path
from typing import Any

import torch
from untrusted_text_tools import directions


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def tensors(layers: Any) -> dict[int, torch.Tensor]:
    return {layer: torch.from_numpy(vector) for layer, vector in directions(layers).items()}
