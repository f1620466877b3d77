"""Reads and writes steer files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.format_detection import detect_format
from vllm_steer.files.steer_file import save_steer
from vllm_steer.files.steer_metadata import read_metadata
from vllm_steer.files.unsupported_files import missing_file_error
from vllm_steer.steers import Steer

__all__ = ["LoadedFile", "load_steer", "read_file", "save_steer"]

_MAX_PATH_CHARACTERS: Final = 300


class LoadedFile(NamedTuple):
    """A steer, and the name of the file format that it was read from."""

    steer: Steer
    format: str


def load_steer(path: str | Path, **overrides: Any) -> Steer:
    """Load a steer from a file. The format is detected from the content, not from the file name.

    Reads vllm-steer's own safetensors files and those of other tools: LM-Steer checkpoints
    (``.pt``), concept-guidance vectors (safetensors), control vectors of repeng and llama.cpp
    (GGUF), activation-steering vectors (``.svec``), vectors of the steering-vectors library
    (``.pt``), deltas of Dynamic Activation Composition (``.pt``), rows of an SAE's decoder
    (SAELens safetensors, Gemma Scope ``.npz``), and plain tensors (``.pt``).

    ``overrides`` add metadata that the file lacks, or replace metadata of the file:

        kind, hidden_size, base_model, description, default_strength
        site            where the steer acts
        layers          the layers to keep; for a plain tensor, the layer of each row
        mode            of a vector: ``add`` or ``rotate``
        schedule        of a step delta: ``fixed``, ``start`` or ``dim``
        epsilon, variant, fixed_columns, columns    of an LM-Steer; ``columns`` are those to keep
        rows            of a plain tensor: the rows to keep
        feature, hook   of SAE weights: the feature's index, and TransformerLens' hook name
        orient          of a concept-guidance file: multiply each row by the sign of its slope

    Raises ``SteerError`` with the file's path, the value that was found and the value that is
    expected: for a file that cannot be read, for content that is no steer, and for an override that
    does not apply to the format. Nothing in the file is executed.

    >>> import tempfile, torch
    >>> from vllm_steer import VectorSteer, load_steer, save_steer
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = f"{folder.name}/calm.safetensors"
    >>> save_steer(VectorSteer(vectors=torch.ones(3, 8), layers=(4, 5, 6)), path)
    >>> load_steer(path).layers
    (4, 5, 6)
    >>> load_steer(path, layers="5-6", default_strength=2).default_strength
    2.0
    >>> folder.cleanup()
    """
    return read_file(path, overrides).steer


def read_file(path: str | Path, overrides: Mapping[str, Any]) -> LoadedFile:
    """Load a steer as ``load_steer`` does, and return the name of the file's format too."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file no error for a name that is too long
        raise missing_file_error(path)
    try:
        metadata = read_metadata(overrides, origin="overrides")
        reader = detect_format(path)
        return LoadedFile(reader.steer(metadata), reader.format)
    except SteerError as error:
        raise SteerError(f"{_shortened(path)}: {error}") from error
    except OSError as error:
        raise SteerError(f"{_shortened(path)}: cannot be read ({error.strerror})") from error
    except (MemoryError, RuntimeError) as error:  # torch raises the latter when out of memory
        raise SteerError(f"{_shortened(path)}: cannot be read ({cause(error)})") from error


def _shortened(path: Path) -> str:
    """A path for a message; a long one loses its beginning."""
    text = str(path)
    return text if len(text) <= _MAX_PATH_CHARACTERS else "..." + text[-_MAX_PATH_CHARACTERS:]
