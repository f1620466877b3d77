"""Safetensors files, of whatever tool: names, shapes and tensors."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.bounds import LARGEST_HEADER, MOST_TENSORS
from vllm_steer.files.json_text import NotJSONError, read_json

_LARGEST_PLAUSIBLE = 100_000_000


def is_safetensors(path: Path) -> bool:
    """Whether the file opens with a safetensors header: a length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) < 9:
        return False
    length: int = struct.unpack("<Q", head[:8])[0]
    return 0 < length <= _LARGEST_PLAUSIBLE and head[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The metadata, and the shape of each tensor by its name; no tensor is read.

    Raises ``SteerError`` for a damaged header, and for one that is larger than a steer's.
    """
    _check_header(path)
    metadata, shapes = _read_header(path)
    if len(shapes) > MOST_TENSORS:
        raise SteerError(
            f"it holds {len(shapes)} tensors; a steer at most {MOST_TENSORS}: is it a model?"
        )
    return metadata, shapes


def _check_header(path: Path) -> None:
    """Raise ``SteerError`` for a header that is too large, or in which a key stands twice."""
    with path.open("rb") as file:
        length: int = struct.unpack("<Q", file.read(8))[0]
        if length > LARGEST_HEADER:
            raise SteerError(
                f"its header has {length} bytes; a steer's has at most {LARGEST_HEADER}: is it a "
                "model?"
            )
        text = file.read(length).decode(errors="surrogateescape")
    with suppress(NotJSONError):  # the library says what is wrong with it
        read_json(text, "its header")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    try:
        with _opened(path) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except Exception as error:  # a damaged header can fail in any way
        raise SteerError(f"not a readable safetensors file ({cause(error)})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, in memory of its own: what was checked stays as it is, whatever
    becomes of the file.
    """
    try:
        return {name: _usable(tensor) for name, tensor in load(path.read_bytes()).items()}
    except Exception as error:  # a dtype that this PyTorch lacks, a tensor cut short
        raise SteerError(f"not a readable safetensors file ({cause(error)})") from error


def read_row(path: Path, name: str, row: int) -> torch.Tensor:
    """One row of a tensor, in memory of its own; the other rows are not read."""
    try:
        with _opened(path) as file:
            return _usable(file.get_slice(name)[row]).clone()
    except Exception as error:  # a dtype that this PyTorch lacks, a tensor cut short
        raise SteerError(f"tensor {name} cannot be read ({cause(error)})") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The library's reader, which would not take a name that is no UTF-8."""
    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as reader:
        yield reader


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; raises for the packed dtypes, which PyTorch reads but cannot convert."""
    tensor.flatten()[:1].to(torch.complex64)
    return tensor
