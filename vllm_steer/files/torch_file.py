"""Files of ``torch.save``, read without trust and without unpickling.

The archive is read here, its pickle as data (``pickled``), and a tensor is a view of the bytes of
its own record. PyTorch's reader is not used: it looks names up without regard to case, so that the
pickle that it reads need not be the one that was checked, and it allocates what a pickle asks for.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.archive import Archive
from vllm_steer.files.bounds import (
    LARGEST_HEADER,
    MOST_TENSORS,
    check_memory,
    check_nesting,
)
from vllm_steer.files.pickled import Name, names_in, read_pickle
from vllm_steer.foreign import listed, shown

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
_ORDERED: Final = "collections.OrderedDict"
_KNOWN: Final = frozenset({_TENSOR, _PARAMETER, _ORDERED, *_DTYPES})
_PICKLE: Final = "data.pkl"


@dataclass(frozen=True)
class Pickle:
    """A file's one pickle: its bytes, and every ``module.name`` in it."""

    archive: Archive
    folder: str
    data: bytes
    names: frozenset[str]


def is_torch(names: Collection[str]) -> bool:
    """Whether the records of an archive are those of ``torch.save``."""
    return any(name.casefold().endswith(_PICKLE) for name in names)


def read_names(archive: Archive) -> Pickle:
    """The pickle of an archive, of which nothing is imported or called.

    Raises ``SteerError`` for an archive without exactly one, and for what only looks like one.
    """
    if any(info.compress_type for info in archive.records.values()):
        raise SteerError("its records are compressed; torch.save writes them as they are")
    if any(name.endswith("/constants.pkl") for name in archive.records):
        raise SteerError("a TorchScript archive, which is a program; save its tensors instead")
    pickles = [name for name in archive.records if name.casefold().endswith(_PICKLE)]
    folder, _, name = pickles[0].rpartition("/")
    if len(pickles) != 1 or name != _PICKLE or not folder or "/" in folder:
        raise SteerError(f"expected one pickle in it, FOLDER/data.pkl; found {listed(pickles)}")
    if not next(iter(archive.records)).startswith(f"{folder}/"):
        raise SteerError(f"its first record is not in {folder}/, where its pickle is")
    if archive.records[pickles[0]].file_size > LARGEST_HEADER:
        raise SteerError(f"expected a pickle of at most {LARGEST_HEADER} bytes in it")
    order = next((n for n in archive.records if n.casefold().endswith("/byteorder")), None)
    if order is not None and archive.read(order) != b"little":
        raise SteerError("its numbers are not little-endian; save it again on another machine")
    data = archive.read(pickles[0])
    try:
        return Pickle(archive, folder, data, names_in(data))
    except SteerError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({cause(error)})") from error


def load(pickle: Pickle, classes: Mapping[str, type]) -> Any:
    """What was saved. ``classes`` are those that its format uses, or stand-ins, by full name.

    Raises ``SteerError`` if the pickle names anything but these and tensors, if it is damaged, if
    it holds more than a steer does, or if a tensor claims more values than its record holds.
    """
    forbidden = sorted(pickle.names - _KNOWN - set(classes))
    if forbidden:
        raise SteerError(
            f"it names {listed(forbidden)}, which a steer file has no use for; nothing of it was "
            "loaded. Save tensors, in a dict if need be; of an LM-Steer [None, state, step], and "
            "give epsilon"
        )
    storages = _Storages(pickle)
    calls = {
        _TENSOR: storages.tensor,
        _PARAMETER: _parameter,
        _ORDERED: _empty_dict,
    }
    try:
        loaded = read_pickle(pickle.data, calls=calls, classes=classes, persistent=storages.storage)
    except SteerError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise SteerError(f"not a readable checkpoint ({cause(error)})") from error
    check_nesting(loaded, "its pickle")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(loaded))
    check_memory(needed, pickle.archive.size, "what it holds")
    return loaded


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    count: int
    key: str


@dataclass
class _Storages:
    """The records of a file as memory, each read once, for the tensors that are views of it."""

    pickle: Pickle
    _known: dict[str, _Storage] = field(default_factory=dict)
    _read: dict[str, torch.Tensor] = field(default_factory=dict)
    _made: int = 0

    def storage(self, given: tuple[Any, ...]) -> _Storage:
        """Of a persistent id: ``('storage', class, key, device, number of values)``."""
        word, cls, key, _, count = given
        if word != "storage" or not isinstance(cls, Name) or cls.name not in _DTYPES:
            raise SteerError(f"its pickle has the persistent id {shown(given)}")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise SteerError(f"its pickle has the persistent id {shown(given)}")
        storage = _Storage(_DTYPES[cls.name], count, key)
        if self._known.setdefault(key, storage) != storage:
            raise SteerError(f"its record {shown(key)} is said to be two kinds of storage")
        return storage

    def tensor(self, given: tuple[Any, ...]) -> torch.Tensor:
        """``(storage, offset, size, stride, requires_grad, hooks)``, as a view of its record.

        Behind these may be the metadata ``{"neg": True}`` of a view whose values are the negative
        of the record's.
        """
        storage, offset, size, stride = given[:4]
        metadata = given[6] if len(given) > 6 else None
        _check_hooks(given[5:6])
        if len(given) > 7 or not _is_read(metadata):
            raise SteerError(f"its pickle has a tensor with {shown(given[6:])}; save a clone of it")
        if not isinstance(storage, _Storage) or not _is_shape(offset, size, stride):
            raise SteerError(f"its pickle has a tensor of {shown(given[:4])}")
        self._made += 1
        if self._made > MOST_TENSORS:
            raise SteerError(f"more than {MOST_TENSORS} tensors; is it a model?")
        values = self._values(storage)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        claimed = prod(size)
        if claimed > len(values) or (claimed and last >= len(values)):
            raise SteerError(
                f"a tensor {shown(list(size))} claims more values ({claimed}) than the file holds "
                f"for it ({len(values)}); save it contiguous"
            )
        view = values.as_strided(size, stride, offset if claimed else 0)
        return -view if metadata else view

    def _values(self, storage: _Storage) -> torch.Tensor:
        record = f"{self.pickle.folder}/data/{storage.key}"
        info = self.pickle.archive.records.get(record)
        if info is None:
            raise SteerError(f"its record {shown(record)} is missing")
        if storage.count * storage.dtype.itemsize != info.file_size:
            raise SteerError(
                f"a storage claims {storage.count} values in {storage.dtype}; its record holds "
                f"{info.file_size} bytes"
            )
        if record not in self._read:
            data = bytearray(self.pickle.archive.read(record))
            self._read[record] = torch.frombuffer(data or bytearray(1), dtype=torch.uint8)
        read = self._read[record]
        return read[: storage.count * storage.dtype.itemsize].view(storage.dtype)


def _is_read(metadata: Any) -> bool:
    """Of metadata PyTorch acts on each key that is there, whatever it says."""
    if metadata is None:
        return True
    return type(metadata) is dict and (
        not metadata or (list(metadata) == ["neg"] and metadata["neg"] is True)
    )


def _parameter(given: tuple[Any, ...]) -> Any:
    """``(tensor, requires_grad, hooks)``: the tensor."""
    _check_hooks(given[2:3])
    return given[0]


def _check_hooks(given: tuple[Any, ...]) -> None:
    """Raise ``SteerError`` for hooks, which are functions; PyTorch writes an empty dict."""
    if any(type(hooks) is not dict or hooks for hooks in given):
        raise SteerError(
            f"its pickle has a tensor with hooks {shown(given[0])}; save a clone of it"
        )


def _is_shape(offset: Any, size: Any, stride: Any) -> bool:
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        return False
    return len(size) <= 8 and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))


def _empty_dict(given: tuple[Any, ...]) -> dict[Any, Any]:
    if given:
        raise SteerError(f"its pickle makes an OrderedDict of {shown(given)}")
    return {}


def _tensors_in(loaded: Any) -> Iterator[torch.Tensor]:
    """Every tensor, as often as it is held."""
    waiting = [loaded]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
        elif hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())
