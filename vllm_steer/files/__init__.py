"""Reads and writes steer files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.format_detection import detect_format
from vllm_steer.files.pyreft_folder import is_folder
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
    (``.pt``), deltas of Dynamic Activation Composition (``.pt``), features of an SAE (SAELens
    safetensors, Gemma Scope ``.npz``), interventions of pyreft (a ``.bin``, or the folder that it
    saves), and plain tensors (``.pt``).

    ``kind`` is given where a file can be read in several ways: ``sae`` for a feature with its
    encoder (else its decoder row is a ``vector``), ``condition`` for a vector that prompts are
    compared to, ``low_rank`` for an LM-Steer inside the layers, ``delta`` for a plain tensor.

    ``overrides`` add metadata that the file lacks, or replace metadata of the file:

        kind, hidden_size, base_model, description, default_strength
        site            where the steer acts
        layers          the layers to keep; for a plain tensor, the layer of each row
        mode            of a vector: ``add``, ``rotate``, ``project`` or ``relative``; of an SAE's
                        feature: ``add``, ``clamp`` or ``scale``
        low, high       bounds of the modes ``project`` and ``clamp``
        schedule        of a step delta: ``fixed``, ``start`` or ``dim``
        epsilon, variant, fixed_columns, columns    of an LM-Steer; ``columns`` are those to keep
        rows            of a plain tensor: the rows to keep
        feature, hook   of SAE weights: the feature's index, and TransformerLens' hook name
        architecture, apply_b_dec_to_input    of SAE weights without SAELens' ``cfg.json``
        threshold, similarity, side, tokens   of a condition
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
    # Unlike Path.is_file no error for a name that is too long.
    if not os.path.isfile(path) and not is_folder(path):
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
