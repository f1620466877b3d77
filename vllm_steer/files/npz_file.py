"""Reads names, shapes, single rows and columns of NumPy archives (``.npz``) without unpickling."""

import ast
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import SEEK_CUR, BytesIO
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.archive import Archive, open_archive

_FORMAT: Any = np.lib.format  # it has no type annotations
_HEADERS = {(1, 0): _FORMAT.read_array_header_1_0, (2, 0): _FORMAT.read_array_header_2_0}
_ENDING = ".npy"
_LONGEST_HEADER = 10_000
_CHUNK = 1 << 20


def array_names(records: Iterable[str]) -> list[str]:
    """The names of the arrays among the records of an archive."""
    return [name.removesuffix(_ENDING) for name in records if name.endswith(_ENDING)]


def read_shape(archive: Archive, name: str) -> list[int]:
    """The shape of an array."""
    with _opened(archive, name) as array:
        return list(array.shape)


def tensor_shape(path: Path, name: str) -> list[int]:
    """The shape of an array."""
    with open_archive(path) as archive:
        return read_shape(archive, name)


def read_row(path: Path, name: str, row: int) -> torch.Tensor:
    """One row of a floating array, as a copy."""
    with _floating(path, name) as array:
        values = array.whole()[row] if array.by_columns else array.row(row)
        array.check()
        return _tensor(values)


def read_vector(path: Path, name: str) -> torch.Tensor:
    """A floating array of one dimension, as a copy."""
    with _floating(path, name) as array:
        values = array.whole()
        array.check()
        return _tensor(values)


def read_column(path: Path, name: str, column: int) -> torch.Tensor:
    """One column of a floating matrix, as a copy."""
    with _floating(path, name) as array:
        values = array.row(column) if array.by_columns else array.column(column)
        array.check()
        return _tensor(values)


@contextmanager
def _floating(path: Path, name: str) -> "Iterator[_Array]":
    with open_archive(path) as archive, _opened(archive, name) as array:
        if array.dtype.kind != "f":
            raise SteerError(f"tensor {name} is {array.dtype}; expected a floating dtype")
        yield array


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


@dataclass(frozen=True)
class _Array:
    """An array whose header was read; ``file`` is positioned at its first value."""

    file: IO[bytes]
    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return prod(self.shape) * self.dtype.itemsize

    def row(self, row: int) -> NDArray[Any]:
        """A row, or a column of a matrix that is stored by columns."""
        width = prod(self.shape[:-1] if self.by_columns else self.shape[1:])
        self.file.seek(row * width * self.dtype.itemsize, SEEK_CUR)
        return np.frombuffer(self.file.read(width * self.dtype.itemsize), self.dtype, width)

    def column(self, column: int) -> NDArray[Any]:
        """A column of a matrix that is stored by rows; one row is in memory at a time."""
        rows, width = self.shape
        values = np.empty(rows, self.dtype)
        for row in range(rows):
            data = self.file.read(width * self.dtype.itemsize)
            values[row] = np.frombuffer(data, self.dtype, width)[column]
        return values

    def whole(self) -> NDArray[Any]:
        values = np.frombuffer(self.file.read(self.size), self.dtype, prod(self.shape))
        return values.reshape(self.shape, order="F")

    def check(self) -> None:
        """Read to the end of the record, where zipfile verifies the checksum."""
        while self.file.read(_CHUNK):
            pass


@contextmanager
def _opened(archive: Archive, name: str) -> Iterator[_Array]:
    record = name + _ENDING
    if name in archive.records:
        raise SteerError(
            f"it has both {name} and {record}, which readers confuse; expected one of them"
        )
    try:
        with archive.open(record) as file:
            array = _Array(file, *_read_header(file))
            if min(array.shape, default=0) < 0:
                raise SteerError(f"tensor {name} is {list(array.shape)}; expected sizes from 0")
            if array.size > archive.records[record].file_size - file.tell():
                raise SteerError(f"tensor {name} declares more values than the file has")
            yield array
    except SteerError:
        raise
    except Exception as error:  # a damaged record or header can fail in any way
        raise SteerError(f"tensor {name} cannot be read ({cause(error)})") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = _FORMAT.read_magic(file)
    if version not in _HEADERS:
        raise SteerError(f"arrays of version {version} are not read; expected (1, 0) or (2, 0)")
    length_size = 2 if version == (1, 0) else 4
    length = file.read(length_size)
    text = file.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER + 1))
    if len(text) > _LONGEST_HEADER:
        raise SteerError(f"an array's header has more than {_LONGEST_HEADER} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ast.parse may print warnings about the header's text
        written = ast.parse(text.decode("latin1").strip(), mode="eval").body
        keys = [repr(getattr(key, "value", key)) for key in getattr(written, "keys", ())]
        if len(keys) != len(set(keys)):
            raise SteerError("an array's header has a duplicate key")
        shape, by_columns, dtype = _HEADERS[version](BytesIO(length + text))
    return shape, by_columns, dtype
