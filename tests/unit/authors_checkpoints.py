"""Checkpoints in the format of the LM-Steer authors' trainer."""

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

COLUMNS, HIDDEN, RANK = 2, 6, 3


def training_arguments(**changed: Any) -> argparse.Namespace:
    arguments: dict[str, Any] = {
        "dataset_name": "toxicity",
        "data_dir": None,
        "ckpt_name": "logs/checkpoint.pt",
        "model_name": "gpt2",
        "cuda": True,
        "adaptor_class": "multiply",
        "adapted_component": "final_layer",
        "epsilon": 1e-3,
        "init_var": 1e-2,
        "rank": RANK,
        "num_steers": COLUMNS,
        "dummy_steer": 1,
        "training_steer": 0,
        "lr": 0.01,
        "n_steps": 1000,
    }
    return argparse.Namespace(**{**arguments, **changed})


def projectors() -> dict[str, Any]:
    torch.manual_seed(5)
    return {
        "projector1": nn.Parameter(torch.randn(COLUMNS, HIDDEN, RANK)),
        "projector2": nn.Parameter(torch.randn(COLUMNS, HIDDEN, RANK)),
    }


def save(path: Path, args: Any, state: Any, **options: Any) -> Path:
    torch.save([args, state, 1000], path, **options)
    return path


def rewrite_archive(
    source: Path,
    target: Path,
    changes: dict[str, Callable[[bytes], bytes] | None],
    *,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy a checkpoint with some records changed (or dropped, for None)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            record = info.filename.partition("/")[2]
            change = changes.get(record, bytes)
            if change is not None:
                new.writestr(info.filename, change(old.read(info)))
    return target
