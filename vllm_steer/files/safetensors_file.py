"""Reads names, shapes and tensors of safetensors files."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.json_text import NotJSONError, read_json
from vllm_steer.files.size_limits import MAX_HEADER_BYTES, MAX_TENSORS

_MAX_PLAUSIBLE_HEADER = 100_000_000


def is_safetensors(path: Path) -> bool:
    """True if the file begins with a safetensors header: a length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) < 9:
        return False
    length: int = struct.unpack("<Q", head[:8])[0]
    return 0 < length <= _MAX_PLAUSIBLE_HEADER and head[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The metadata, and the shape of each tensor by name; no tensor is read.

    Raises ``SteerError`` for a damaged header and for one that is too large for a steer.
    """
    _check_header(path)
    metadata, shapes = _read_header(path)
    if len(shapes) > MAX_TENSORS:
        raise SteerError(
            f"it has {len(shapes)} tensors; a steer has at most {MAX_TENSORS}: is it a model "
            "checkpoint?"
        )
    return metadata, shapes


def _check_header(path: Path) -> None:
    """Raise ``SteerError`` for a header that is too large or has a duplicate key."""
    with path.open("rb") as file:
        length: int = struct.unpack("<Q", file.read(8))[0]
        if length > MAX_HEADER_BYTES:
            raise SteerError(
                f"its header has {length} bytes; a steer's has at most {MAX_HEADER_BYTES}: is it a "
                "model checkpoint?"
            )
        text = file.read(length).decode(errors="surrogateescape")
    with suppress(NotJSONError):  # the library reports what is wrong
        read_json(text, "its header")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    try:
        with _opened(path) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except Exception as error:  # a damaged header can fail in any way
        raise SteerError(f"not a readable safetensors file ({cause(error)})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor by name, as copies that do not change if the file does."""
    try:
        return {name: _convertible(tensor) for name, tensor in load(path.read_bytes()).items()}
    except Exception as error:  # an unknown dtype, a truncated tensor
        raise SteerError(f"not a readable safetensors file ({cause(error)})") from error


def read_row(path: Path, name: str, row: int) -> torch.Tensor:
    """One row of a tensor, as a copy; the other rows are not read."""
    try:
        with _opened(path) as file:
            return _convertible(file.get_slice(name)[row]).clone()
    except Exception as error:  # an unknown dtype, a truncated tensor
        raise SteerError(f"tensor {name} cannot be read ({cause(error)})") from error


def read_vector(path: Path, name: str) -> torch.Tensor:
    """A tensor of one dimension, as a copy."""
    try:
        with _opened(path) as file:
            return _convertible(file.get_slice(name)[:]).clone()
    except Exception as error:  # an unknown dtype, a truncated tensor
        raise SteerError(f"tensor {name} cannot be read ({cause(error)})") from error


def read_column(path: Path, name: str, column: int) -> torch.Tensor:
    """One column of a matrix, as a copy."""
    try:
        with _opened(path) as file:
            return _convertible(file.get_slice(name)[:, column]).clone()
    except Exception as error:  # an unknown dtype, a truncated tensor
        raise SteerError(f"tensor {name} cannot be read ({cause(error)})") from error


def tensor_shape(path: Path, name: str) -> list[int]:
    """The shape of a tensor."""
    return _read_header(path)[1][name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The library's reader, opened by file descriptor: it rejects a path that is not UTF-8."""
    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as reader:
        yield reader


def _convertible(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; raises for packed dtypes, which PyTorch loads but cannot convert."""
    tensor.flatten()[:1].to(torch.complex64)
    return tensor
