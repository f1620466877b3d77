"""Helpers that run the command line in this process."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from vllm_steer.cli import app

MAIN = "from vllm_steer.cli import main; main()"


def call(*line: Any) -> Any:
    """Run a command in this process, with its streams as terminals."""
    environment = {"FORCE_COLOR": "1", "COLUMNS": "100"}
    return CliRunner().invoke(app, [str(part) for part in line], env=environment)


def steer_of(path: Path, text: str) -> Path:
    """A steer file with the same untrusted text in all its text fields."""
    recipe = {"method": text, text[:1000]: {text[:1000]: [text, {text[:1000]: text}]}}
    recipe["figures"] = {"read_layers": [[text]], "train_accuracy": [text], text[:99]: text}
    metadata = {
        **{"format": "vllm-steer", "format_version": "1", "kind": "vector"},
        **{"hidden_size": "4", "layers": "0-1", "site": "resid", "mode": "add"},
        **{"description": text, "base_model": text[:1000], "recipe": json.dumps(recipe)},
    }
    if len(text) > 100_000:
        metadata["recipe"] = "{}"
    save_file({"vectors": torch.ones(2, 4)}, str(path), metadata=metadata)
    return path
