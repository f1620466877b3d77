"""NumPy archives (``.npz``): names, shapes and single rows, without unpickling anything."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import SEEK_CUR
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steer.errors import SteerError
from vllm_steer.files.source import cause

_FORMAT: Any = np.lib.format  # it has no type annotations


def is_npz(path: Path) -> bool:
    """Whether a zip archive holds NumPy arrays and not what ``torch.save`` writes."""
    return bool(names(path))


def names(path: Path) -> list[str]:
    """The arrays in an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except Exception as error:  # a damaged directory can fail in any way
        raise SteerError(f"not a readable archive ({cause(error)})") from error
    if any(name.endswith("data.pkl") for name in members):
        return []
    return [name.removesuffix(".npy") for name in members if name.endswith(".npy")]


def read_shape(path: Path, name: str) -> list[int]:
    """The shape of an array."""
    with _opened(path, name) as array:
        return list(array.shape)


def read_row(path: Path, name: str, row: int) -> torch.Tensor:
    """One row of a floating array, in memory of its own."""
    with _opened(path, name) as array:
        if array.dtype.kind != "f":
            raise SteerError(f"tensor {name} is {array.dtype}; a floating dtype is wanted")
        values = array.whole()[row] if array.by_columns else array.row(row)
        return torch.from_numpy(values.astype(array.dtype.newbyteorder("=")))


@dataclass(frozen=True)
class _Array:
    """An array whose header was read: ``file`` stands at its first value."""

    file: IO[bytes]
    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]

    def row(self, row: int) -> NDArray[Any]:
        width = prod(self.shape[1:])
        self.file.seek(row * width * self.dtype.itemsize, SEEK_CUR)
        return np.frombuffer(self.file.read(width * self.dtype.itemsize), self.dtype, width)

    def whole(self) -> NDArray[Any]:
        count = prod(self.shape)
        values = np.frombuffer(self.file.read(count * self.dtype.itemsize), self.dtype, count)
        return values.reshape(self.shape, order="F")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[_Array]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            array = _Array(file, *_read_header(file))
            claimed = prod(array.shape) * array.dtype.itemsize
            info = archive.getinfo(f"{name}.npy")
            # Deflate reaches a ratio of 1032 at most: a record cannot hold what it claims beyond.
            if claimed > min(info.file_size, 1100 * path.stat().st_size):
                raise SteerError(f"tensor {name} claims more values than the file holds")
            yield array
    except SteerError:
        raise
    except Exception as error:  # a damaged archive or header can fail in any way
        raise SteerError(f"tensor {name} cannot be read ({cause(error)})") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = _FORMAT.read_magic(file)
    if version == (1, 0):
        shape, by_columns, dtype = _FORMAT.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, by_columns, dtype = _FORMAT.read_array_header_2_0(file)
    else:
        raise SteerError(f"arrays of version {version} are not read; wanted: (1, 0) or (2, 0)")
    return shape, by_columns, dtype
