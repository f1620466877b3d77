"""Steer files: the one place where they are read and written."""

import os
from pathlib import Path
from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.files.facts import read_facts
from vllm_steer.files.lm_steer_checkpoint import is_checkpoint, read_checkpoint
from vllm_steer.files.steer_file import is_safetensors, read_steer_file, save_steer
from vllm_steer.steers import Steer

__all__ = ["load_steer", "save_steer"]


def load_steer(path: str | Path, **facts: Any) -> Steer:
    """Load a steer from a file, told apart by its content and not by its name.

    Reads vllm-steer's own safetensors files and the LM-Steer authors' ``.pt`` checkpoints.
    ``facts`` supply what the file does not say, or replace what it says: ``kind``, ``epsilon``,
    ``fixed_columns``, ``columns`` (which of the file's columns to keep), ``default_strength``,
    ``base_model``, ``description``.

    Raises ``SteerError`` naming the file, the value found and the value wanted. Nothing in the
    file is ever executed.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file no error for a name that is too long
        raise SteerError(f"{path}: no such file; give the path of a steer file")
    try:
        known = read_facts(facts, origin="facts")
        if is_safetensors(path):
            return read_steer_file(path, known)
        if is_checkpoint(path):
            return read_checkpoint(path, known)
    except SteerError as error:
        raise SteerError(f"{path}: {error}") from error
    raise SteerError(
        f"{path}: neither a safetensors file nor a PyTorch checkpoint; "
        "save it with vllm_steer.save_steer"
    )
