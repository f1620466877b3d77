"""Steer files: the one place where they are read and written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.facts import read_facts
from vllm_steer.files.identify import identify
from vllm_steer.files.steer_file import save_steer
from vllm_steer.files.strange import no_file
from vllm_steer.steers import Steer

__all__ = ["Loaded", "load_steer", "read_file", "save_steer"]

_LONGEST_PATH: Final = 300


class Loaded(NamedTuple):
    """A steer and, in words, the format of the file that it was read from."""

    steer: Steer
    format: str


def load_steer(path: str | Path, **facts: Any) -> Steer:
    """Load a steer from a file, told apart by its content and not by its name.

    Reads vllm-steer's own safetensors files and those of other tools: LM-Steer checkpoints
    (``.pt``), concept-guidance vectors (safetensors), control vectors of repeng and llama.cpp
    (GGUF), activation-steering vectors (``.svec``), vectors of the steering-vectors library
    (``.pt``), deltas of Dynamic Activation Composition (``.pt``), rows of an SAE's decoder
    (SAELens safetensors, Gemma Scope ``.npz``), and plain tensors (``.pt``).

    ``facts`` supply what the file does not say, or replace what it says: ``kind``, ``layers``
    (which of the file's layers to keep, or which its rows are for), ``site``, ``mode``,
    ``schedule``, ``epsilon``, ``fixed_columns``, ``columns`` (which of the file's columns to keep),
    ``rows`` (which of a plain tensor's), ``feature`` and ``hook`` (of an SAE), ``orient`` (by
    concept-guidance's signs), ``hidden_size``, ``default_strength``, ``base_model``,
    ``description``. One that the format has no use for is an error.

    Raises ``SteerError`` naming the file, the value found and the value wanted. Nothing in the
    file is ever executed.
    """
    return read_file(path, facts).steer


def read_file(path: str | Path, facts: Mapping[str, Any]) -> Loaded:
    """Like ``load_steer``, and says which format the file has."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file no error for a name that is too long
        raise no_file(path)
    try:
        known = read_facts(facts, origin="facts")
        source = identify(path)
        return Loaded(source.steer(known), source.format)
    except SteerError as error:
        raise SteerError(f"{_shown(path)}: {error}") from error
    except OSError as error:
        raise SteerError(f"{_shown(path)}: cannot be read ({error.strerror})") from error
    except (MemoryError, RuntimeError) as error:  # torch says with the latter that memory is out
        raise SteerError(f"{_shown(path)}: cannot be read ({cause(error)})") from error


def _shown(path: Path) -> str:
    """A path for a message, without its beginning where that leaves no room for the rest."""
    text = str(path)
    return text if len(text) <= _LONGEST_PATH else "..." + text[-_LONGEST_PATH:]
