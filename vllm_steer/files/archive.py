"""Zip archives of tensors, read strictly: what is checked is what is read.

Zip readers differ in what they make of an archive that contradicts itself: names that differ in
case only, records that overlap, two directories. Such an archive is refused as a whole.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.bounds import LARGEST_HEADER, check_memory
from vllm_steer.foreign import shown

_END: Final = b"PK\x05\x06"
_END_LENGTH: Final = 22
_LOCATOR: Final = b"PK\x06\x07"
_LOCATOR_LENGTH: Final = 20
_END64: Final = b"PK\x06\x06"
_END64_LENGTH: Final = 56
_LOCAL_HEADER: Final = 30
_LONGEST_COMMENT: Final = 1 << 16
_ENCRYPTED: Final = 1
_FOLDER: Final = 0x10
_READ: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others can ask for gigabytes


@dataclass(frozen=True)
class Archive:
    """An open archive and its records by their names; ``size`` of the file in bytes."""

    records: Mapping[str, zipfile.ZipInfo]
    size: int
    _zip: zipfile.ZipFile

    def read(self, name: str) -> bytes:
        """A whole record, whose checksum is checked; ``SteerError`` as ``open`` raises it."""
        with self.open(name) as record:
            return record.read()

    def open(self, name: str) -> IO[bytes]:
        """A record as a file. Raises ``SteerError`` if it unpacks to far more than the archive."""
        check_memory(self.records[name].file_size, self.size, f"its record {shown(name)}")
        return self._zip.open(self.records[name])


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an archive. Raises ``SteerError`` for one that is damaged or that contradicts itself.

    What fails inside of the block is a ``SteerError`` too: a damaged record can fail in any way.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            _check_directory(file, size)
            with zipfile.ZipFile(file) as archive:
                yield Archive(_records(archive), size, archive)
    except SteerError:
        raise
    except Exception as error:
        raise SteerError(f"not a readable archive ({cause(error)})") from error


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    records = {info.filename: info for info in archive.infolist()}
    if len({name.casefold() for name in records}) != len(archive.infolist()):
        raise SteerError("two of its records have one name, but for upper and lower case")
    for info in records.values():
        if info.flag_bits & _ENCRYPTED:
            raise SteerError(f"its record {shown(info.filename)} is encrypted")
        if info.compress_type not in _READ:
            raise SteerError(f"its record {shown(info.filename)} is compressed, not by deflate")
        if info.external_attr & _FOLDER and info.file_size:
            raise SteerError(f"its record {shown(info.filename)} is marked as a folder")
    _check_apart(archive)
    return records


def _check_apart(archive: zipfile.ZipFile) -> None:
    """Raise ``SteerError`` for records that overlap: few bytes would stand for many."""
    by_place = sorted(archive.infolist(), key=lambda info: info.header_offset)
    starts = [info.header_offset for info in by_place]
    if starts and starts[0] != 0:
        raise SteerError("something stands before its first record")
    for info, end in zip(by_place, [*starts[1:], archive.start_dir], strict=bool(starts)):
        if info.header_offset + _LOCAL_HEADER + info.compress_size > end:
            raise SteerError(f"its record {shown(info.filename)} reaches into the next one")


def _check_directory(file: IO[bytes], size: int) -> None:
    """Raise ``SteerError`` for a directory of more bytes than a steer's, before it is read, and for
    one that is not where every reader looks for it: right before the end, which names its place.
    """
    first = max(0, size - _END_LENGTH - _LONGEST_COMMENT)
    file.seek(first)
    tail = file.read()
    file.seek(0)
    end = len(tail) - _END_LENGTH
    if end < 0 or not (tail.startswith(_END, end) and tail.endswith(b"\0\0")):
        end = tail.rfind(_END)
    if end < 0 or len(tail) < end + _END_LENGTH:
        raise SteerError("not a readable archive (it has no end: was it cut short?)")
    count, length, at, comment = struct.unpack_from("<HLLH", tail, end + 10)
    behind = first + end
    locator = end - _LOCATOR_LENGTH
    if locator >= 0 and tail.startswith(_LOCATOR, locator):
        behind = first + locator - _END64_LENGTH
        length, at = _directory64(
            tail[max(0, locator - _END64_LENGTH) :], behind, count, length, at
        )
    if length > LARGEST_HEADER:
        raise SteerError(
            f"its directory has {length} bytes; at most {LARGEST_HEADER} are read: is it a model?"
        )
    if at + length != behind or end + _END_LENGTH + comment != len(tail):
        raise SteerError("its directory is not where its end says: are these two archives?")


def _directory64(record: bytes, behind: int, count: int, length: int, at: int) -> tuple[int, int]:
    """Length and place of the directory by the second kind of end, for which it is ``behind``."""
    located = struct.unpack_from("<Q", record, _END64_LENGTH + 8)[0]
    if located != behind or not record.startswith(_END64):
        raise SteerError("not a readable archive (its two ends disagree)")
    count64, length64, at64 = struct.unpack_from("<QQQ", record, 32)
    told = ((count, count64, 0xFFFF), (length, length64, 0xFFFFFFFF), (at, at64, 0xFFFFFFFF))
    if any(short not in (long, unsaid) for short, long, unsaid in told):
        raise SteerError("not a readable archive (its two ends disagree)")
    return length64, at64
