"""Zip archives: contradictory ones and decompression bombs are refused."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_steer import SteerError
from vllm_steer.files.archive import open_archive
from vllm_steer.files.size_limits import MAX_HEADER_BYTES

DATA = b"0123456789abcdef"


def zipped(*names: str, compression: int = zipfile.ZIP_STORED, data: bytes = DATA) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def entry(data: bytes, number: int) -> int:
    """Where an entry of the directory begins."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def with_end64(data: bytes, directory: int, at: int | None = None) -> bytes:
    """The same with a zip64 end, to which the other leaves the directory's length."""
    end = data.rindex(b"PK\x05\x06")
    count, _, start = struct.unpack_from("<HLL", data, end + 10)
    numbers = (44, 45, 45, 0, 0, count, count, directory, start)
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", *numbers)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end if at is None else at, 1)
    unsaid = changed(data[end:], 12, b"\xff" * 4)
    return data[:end] + record + locator + unsaid


def read_all(path: Path) -> dict[str, bytes]:
    with open_archive(path) as archive:
        return {name: archive.read(name) for name in archive.records}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_read(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zipped("a", "b/c", compression=compression))
    assert read_all(path) == {"a": DATA, "b/c": DATA}


TWO = zipped("a", "b")
LENGTH = TWO.rindex(b"PK\x05\x06") - TWO.index(b"PK\x01\x02")


def two_directories() -> bytes:
    """The locator leads to one directory; Python's own reader takes the one before the locator."""
    one, other = with_end64(zipped("a"), LENGTH // 2), zipped("b")
    end64 = one.index(b"PK\x06\x06")
    directory = other[other.index(b"PK\x01\x02") : other.index(b"PK\x05\x06")]
    return one[: end64 + 56] + directory + one[end64 : end64 + 56] + one[end64 + 56 :]


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "case": (
        lambda: zipped("a/x", "A/X"),
        "two records have names that differ in upper and lower case only",
    ),
    "fold": (
        lambda: zipped("stra\u00dfe", "STRASSE"),
        "two records have names that differ in upper and lower case only",
    ),
    "one-place": (
        lambda: changed(TWO, entry(TWO, 1) + 42, struct.pack("<L", 0)),
        "overlaps the next record",
    ),
    "too-long": (
        lambda: changed(TWO, entry(TWO, 0) + 20, struct.pack("<LL", 60, 60)),
        "its record 'a' overlaps the next record",
    ),
    "encrypted": (
        lambda: changed(TWO, entry(TWO, 1) + 8, b"\x01\x00"),
        "its record 'b' is encrypted",
    ),
    "lzma": (
        lambda: zipped("a", compression=zipfile.ZIP_LZMA),
        "its record 'a' has an unsupported compression",
    ),
    "checksum": (lambda: TWO.replace(DATA, DATA[::-1], 1), "not a readable archive"),
    "other-name": (lambda: TWO.replace(b"a" + DATA, b"c" + DATA, 1), "not a readable archive"),
    "cut": (lambda: TWO[:-1], "it has no end record: is the file truncated"),
    "empty": (lambda: b"", "it has no end"),
    "large-directory": (
        lambda: changed(
            TWO, TWO.rindex(b"PK\x05\x06") + 12, struct.pack("<L", MAX_HEADER_BYTES + 1)
        ),
        "its directory has 1000001 bytes",
    ),
    "large-directory-64": (
        lambda: with_end64(TWO, 1 << 60),
        "its directory has 11529215046",
    ),
    "end-outside": (lambda: with_end64(TWO, 10, at=1 << 40), "its two end records disagree"),
    "short-directory": (
        lambda: with_end64(TWO, 10),
        "its directory is not where its end record says",
    ),
    "two-archives": (
        lambda: zipped("a") + zipped("b"),
        "its directory is not where its end record says",
    ),
    "junk-before": (
        lambda: b"PK\x03\x04junk" + TWO,
        "its directory is not where its end record says",
    ),
    "junk-behind": (lambda: TWO + b"junk", "its directory is not where its end record says"),
    "two-directories": (lambda: two_directories(), "its two end records disagree"),
    "other-count": (
        lambda: changed(with_end64(TWO, LENGTH), -12, b"\x07\x00"),
        "its two end records disagree",
    ),
    "folder": (
        lambda: changed(TWO, entry(TWO, 1) + 38, b"\x10\0\0\0"),
        "its record 'b' is marked as a folder",
    ),
    "end-elsewhere": (lambda: with_end64(TWO, 10, at=3), "its two end records disagree"),
    "bomb": (
        lambda: zipped("a", compression=zipfile.ZIP_DEFLATED, data=bytes(65 << 20)),
        "its record 'a' needs 68157440 bytes of memory",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_archive_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    make, message = BROKEN[case]
    path = tmp_path / "a.zip"
    path.write_bytes(make())
    with pytest.raises(SteerError, match=message):
        read_all(path)


def test_an_archive_with_both_kinds_of_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(with_end64(TWO, LENGTH))
    assert read_all(path) == {"a": DATA, "b": DATA}


def test_a_directory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(BROKEN["large-directory"][0]())
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(SteerError, match="its directory has"):
        read_all(path)
