"""Reads files of ``torch.save`` without unpickling them.

The pickle is read as data (``pickle_reader``), and a tensor is a view of the bytes of its record.
PyTorch's own reader is not used: it looks up record names case-insensitively, so it may read
another pickle than the one that was checked, and it allocates whatever size the pickle declares.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.archive import Archive
from vllm_steer.files.pickle_reader import GlobalName, global_names, read_pickle
from vllm_steer.files.size_limits import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    check_memory,
    check_nesting,
)
from vllm_steer.untrusted_text import listed, shown

_DTYPES: Final = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
}
_TENSOR: Final = "torch._utils._rebuild_tensor_v2"
_PARAMETER: Final = "torch._utils._rebuild_parameter"
_ORDERED_DICT: Final = "collections.OrderedDict"
_ALLOWED_NAMES: Final = frozenset({_TENSOR, _PARAMETER, _ORDERED_DICT, *_DTYPES})
_PICKLE: Final = "data.pkl"


@dataclass(frozen=True)
class Pickle:
    """The pickle of a file: its bytes, and every ``module.name`` in it."""

    archive: Archive
    folder: str
    data: bytes
    names: frozenset[str]


def is_torch(names: Collection[str]) -> bool:
    """True if the records of an archive are those of ``torch.save``."""
    return any(name.casefold().endswith(_PICKLE) for name in names)


def read_names(archive: Archive) -> Pickle:
    """The pickle of an archive; nothing in it is imported or called.

    Raises ``SteerError`` unless the archive has exactly one pickle in the layout of ``torch.save``.
    """
    if any(info.compress_type for info in archive.records.values()):
        raise SteerError(
            "its records are compressed; expected the uncompressed records of torch.save"
        )
    if any(name.endswith("/constants.pkl") for name in archive.records):
        raise SteerError("a TorchScript archive, which contains code; save its tensors instead")
    pickles = [name for name in archive.records if name.casefold().endswith(_PICKLE)]
    folder, _, name = pickles[0].rpartition("/")
    if len(pickles) != 1 or name != _PICKLE or not folder or "/" in folder:
        raise SteerError(f"expected one pickle, FOLDER/data.pkl; found {listed(pickles)}")
    if not next(iter(archive.records)).startswith(f"{folder}/"):
        raise SteerError(f"its first record is not in {folder}/, the folder of its pickle")
    if archive.records[pickles[0]].file_size > MAX_HEADER_BYTES:
        raise SteerError(f"its pickle has more than {MAX_HEADER_BYTES} bytes, the limit")
    order = next((n for n in archive.records if n.casefold().endswith("/byteorder")), None)
    if order is not None and archive.read(order) != b"little":
        raise SteerError(
            "its tensors are not little-endian; save it again on a little-endian machine"
        )
    data = archive.read(pickles[0])
    try:
        return Pickle(archive, folder, data, global_names(data))
    except SteerError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({cause(error)})") from error


def load(pickle: Pickle, classes: Mapping[str, type]) -> Any:
    """The saved object. ``classes`` are the classes that the format uses, by full name.

    Raises ``SteerError`` if the pickle refers to anything but these classes and tensors, if it is
    damaged or too large for a steer, or if a tensor declares more values than its record has.
    """
    forbidden = sorted(pickle.names - _ALLOWED_NAMES - set(classes))
    if forbidden:
        raise SteerError(
            f"refused: its pickle refers to {listed(forbidden)}; nothing was loaded. Save tensors "
            "only, in a dict if there are several; for an LM-Steer save [None, state, step] and "
            "give epsilon"
        )
    storages = _Storages(pickle)
    calls = {
        _TENSOR: storages.tensor,
        _PARAMETER: _parameter,
        _ORDERED_DICT: _empty_dict,
    }
    try:
        loaded = read_pickle(pickle.data, calls=calls, classes=classes, persistent=storages.storage)
    except SteerError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({cause(error)})") from error
    check_nesting(loaded, "its pickle")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(loaded))
    check_memory(needed, pickle.archive.size, "its content")
    return loaded


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    count: int
    key: str


@dataclass
class _Storages:
    """The storages of a file; each record is read once, and its tensors are views of it."""

    pickle: Pickle
    _by_key: dict[str, _Storage] = field(default_factory=dict)
    _records: dict[str, torch.Tensor] = field(default_factory=dict)
    _num_tensors: int = 0

    def storage(self, persistent_id: tuple[Any, ...]) -> _Storage:
        """Resolve a persistent id ``('storage', class, key, device, number of values)``."""
        word, cls, key, _, count = persistent_id
        if word != "storage" or not isinstance(cls, GlobalName) or cls.name not in _DTYPES:
            raise SteerError(f"its pickle has the persistent id {shown(persistent_id)}")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise SteerError(f"its pickle has the persistent id {shown(persistent_id)}")
        storage = _Storage(_DTYPES[cls.name], count, key)
        if self._by_key.setdefault(key, storage) != storage:
            raise SteerError(f"its record {shown(key)} is declared as two kinds of storage")
        return storage

    def tensor(self, arguments: tuple[Any, ...]) -> torch.Tensor:
        """The tensor ``(storage, offset, size, stride, requires_grad, hooks)``, a view of its
        record.

        A seventh argument may be ``{"neg": True}``, for a view of the negated values.
        """
        storage, offset, size, stride = arguments[:4]
        metadata = arguments[6] if len(arguments) > 6 else None
        _check_hooks(arguments[5:6])
        if len(arguments) > 7 or not _is_supported_metadata(metadata):
            raise SteerError(
                f"its pickle has a tensor with {shown(arguments[6:])}; save a clone of it"
            )
        if not isinstance(storage, _Storage) or not _is_shape(offset, size, stride):
            raise SteerError(f"its pickle has a tensor of {shown(arguments[:4])}")
        self._num_tensors += 1
        if self._num_tensors > MAX_TENSORS:
            raise SteerError(f"it has more than {MAX_TENSORS} tensors; is it a model checkpoint?")
        values = self._values(storage)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        num_values = prod(size)
        if num_values > len(values) or (num_values and last >= len(values)):
            raise SteerError(
                f"a tensor {shown(list(size))} declares {num_values} values and its record has "
                f"{len(values)}; save it contiguous"
            )
        view = values.as_strided(size, stride, offset if num_values else 0)
        return -view if metadata else view

    def _values(self, storage: _Storage) -> torch.Tensor:
        record = f"{self.pickle.folder}/data/{storage.key}"
        info = self.pickle.archive.records.get(record)
        if info is None:
            raise SteerError(f"its record {shown(record)} is missing")
        if storage.count * storage.dtype.itemsize != info.file_size:
            raise SteerError(
                f"a storage declares {storage.count} values in {storage.dtype}; its record has "
                f"{info.file_size} bytes"
            )
        if record not in self._records:
            data = bytearray(self.pickle.archive.read(record))
            self._records[record] = torch.frombuffer(data or bytearray(1), dtype=torch.uint8)
        record_memory = self._records[record]
        return record_memory[: storage.count * storage.dtype.itemsize].view(storage.dtype)


def _is_supported_metadata(metadata: Any) -> bool:
    """True for no metadata or ``{"neg": True}``; PyTorch acts on each key, whatever its value."""
    if metadata is None:
        return True
    return type(metadata) is dict and (
        not metadata or (list(metadata) == ["neg"] and metadata["neg"] is True)
    )


def _parameter(arguments: tuple[Any, ...]) -> Any:
    """The tensor of ``(tensor, requires_grad, hooks)``."""
    _check_hooks(arguments[2:3])
    return arguments[0]


def _check_hooks(hook_arguments: tuple[Any, ...]) -> None:
    """Raise ``SteerError`` for hooks, which are functions; ``torch.save`` writes an empty dict."""
    if any(type(hooks) is not dict or hooks for hooks in hook_arguments):
        raise SteerError(
            f"its pickle has a tensor with hooks {shown(hook_arguments[0])}; save a clone of it"
        )


def _is_shape(offset: Any, size: Any, stride: Any) -> bool:
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        return False
    return len(size) <= 8 and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise SteerError(
            f"its pickle creates an OrderedDict from {shown(arguments)}; expected no arguments"
        )
    return {}


def _tensors_in(loaded: Any) -> Iterator[torch.Tensor]:
    """Every tensor, once per reference."""
    pending = [loaded]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif hasattr(item, "__dict__"):
            pending.extend(vars(item).values())
