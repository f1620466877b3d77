"""Reads zip archives of tensors strictly, so that all readers agree on the content.

Zip readers interpret an inconsistent archive differently: record names that differ in case only,
overlapping records, two directories. Such an archive is rejected as a whole.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.size_limits import MAX_HEADER_BYTES, check_memory
from vllm_steer.untrusted_text import shown

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
# Other methods can allocate gigabytes.
_SUPPORTED_COMPRESSION: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Archive:
    """An open archive: its records by name, and the file's ``size`` in bytes."""

    records: Mapping[str, zipfile.ZipInfo]
    size: int
    _zip: zipfile.ZipFile

    def read(self, name: str) -> bytes:
        """Read a whole record and verify its checksum. Raises ``SteerError`` as ``open`` does."""
        with self.open(name) as record:
            return record.read()

    def open(self, name: str) -> IO[bytes]:
        """Open a record. Raises ``SteerError`` if its content is far larger than the archive."""
        check_memory(self.records[name].file_size, self.size, f"its record {shown(name)}")
        return self._zip.open(self.records[name])


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an archive. Raises ``SteerError`` if it is damaged or inconsistent.

    An exception inside the ``with`` block becomes a ``SteerError`` too: reading a damaged record
    can raise any exception.
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
        raise SteerError("two records have names that differ in upper and lower case only")
    for info in records.values():
        if info.flag_bits & _ENCRYPTED:
            raise SteerError(f"its record {shown(info.filename)} is encrypted")
        if info.compress_type not in _SUPPORTED_COMPRESSION:
            raise SteerError(
                f"its record {shown(info.filename)} has an unsupported compression; expected "
                "stored or deflate"
            )
        if info.external_attr & _FOLDER and info.file_size:
            raise SteerError(f"its record {shown(info.filename)} is marked as a folder")
    _check_no_overlap(archive)
    return records


def _check_no_overlap(archive: zipfile.ZipFile) -> None:
    """Raise ``SteerError`` for overlapping records: a small file could expand to a huge one."""
    by_offset = sorted(archive.infolist(), key=lambda info: info.header_offset)
    starts = [info.header_offset for info in by_offset]
    if starts and starts[0] != 0:
        raise SteerError("there are bytes before the first record; expected a plain zip archive")
    for info, end in zip(by_offset, [*starts[1:], archive.start_dir], strict=bool(starts)):
        if info.header_offset + _LOCAL_HEADER + info.compress_size > end:
            raise SteerError(f"its record {shown(info.filename)} overlaps the next record")


def _check_directory(file: IO[bytes], size: int) -> None:
    """Raise ``SteerError`` for a directory that is too large or not directly before its end record.

    The directory's size is checked before the directory is read.
    """
    first = max(0, size - _END_LENGTH - _LONGEST_COMMENT)
    file.seek(first)
    tail = file.read()
    file.seek(0)
    end = len(tail) - _END_LENGTH
    if end < 0 or not (tail.startswith(_END, end) and tail.endswith(b"\0\0")):
        end = tail.rfind(_END)
    if end < 0 or len(tail) < end + _END_LENGTH:
        raise SteerError("not a readable archive (it has no end record: is the file truncated?)")
    count, length, start, comment = struct.unpack_from("<HLLH", tail, end + 10)
    end_of_directory = first + end
    locator = end - _LOCATOR_LENGTH
    if locator >= 0 and tail.startswith(_LOCATOR, locator):
        end_of_directory = first + locator - _END64_LENGTH
        length, start = _directory64(
            tail[max(0, locator - _END64_LENGTH) :], end_of_directory, count, length, start
        )
    if length > MAX_HEADER_BYTES:
        raise SteerError(
            f"its directory has {length} bytes; at most {MAX_HEADER_BYTES} are read: is it a "
            "model checkpoint?"
        )
    if start + length != end_of_directory or end + _END_LENGTH + comment != len(tail):
        raise SteerError(
            "its directory is not where its end record says: are two archives concatenated?"
        )


def _directory64(
    record: bytes, end_of_directory: int, count: int, length: int, start: int
) -> tuple[int, int]:
    """The directory's length and start from the zip64 end record at ``end_of_directory``."""
    located = struct.unpack_from("<Q", record, _END64_LENGTH + 8)[0]
    if located != end_of_directory or not record.startswith(_END64):
        raise SteerError("not a readable archive (its two end records disagree)")
    count64, length64, start64 = struct.unpack_from("<QQQ", record, 32)
    fields = (
        (count, count64, 0xFFFF),
        (length, length64, 0xFFFFFFFF),
        (start, start64, 0xFFFFFFFF),
    )
    if any(short not in (long, unsaid) for short, long, unsaid in fields):
        raise SteerError("not a readable archive (its two end records disagree)")
    return length64, start64
