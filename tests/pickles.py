"""An assembler for pickles and for their archives."""

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


class Raw(bytes):
    """Instructions that leave one value."""


def name(path: str) -> Raw:
    """GLOBAL: the value under a module's name."""
    module, _, attribute = path.rpartition(".")
    return Raw(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")


def call(path: str, *arguments: Any) -> Raw:
    """REDUCE: the result of a call."""
    return Raw(name(path) + code(tuple(arguments)) + b"R")


def namespace(**fields: Any) -> Raw:
    """An ``argparse.Namespace`` with these attributes."""
    return made("argparse.Namespace", dict(fields))


def made(cls: str, state: Any) -> Raw:
    """NEWOBJ and BUILD: an instance with a state."""
    return Raw(name(cls) + b")\x81" + code(state) + b"b")


def ordered(*pairs: Any, state: Any = None) -> Raw:
    """An ``OrderedDict`` filled afterwards, perhaps with attributes of its own."""
    items = b"".join(code(key) + code(value) for key, value in pairs)
    built = b"" if state is None else code(state) + b"b"
    return Raw(call("collections.OrderedDict") + built + b"(" + items + b"u")


def storage(
    key: Any = "0", count: Any = 4, kind: str = "torch.FloatStorage", word: str = "storage"
):
    return Raw(code((word, name(kind), key, "cpu", count)) + b"Q")


def tensor(
    size: Any = (4,),
    stride: Any = (1,),
    offset: Any = 0,
    of: Raw | None = None,
    hooks: Any = None,
    rebuild: str = "torch._utils._rebuild_tensor_v2",
) -> Raw:
    hooks = call("collections.OrderedDict") if hooks is None else hooks
    return call(rebuild, storage() if of is None else of, offset, size, stride, False, hooks)


def shared(depth: int, of: bytes) -> Raw:
    """A value that expands to ``2**depth`` copies: each pair contains the previous one twice."""
    out = of + b"r" + struct.pack("<I", 100_000)
    for level in range(depth):
        before = struct.pack("<I", 100_000 + level)
        out += b"j" + before + b"\x86r" + struct.pack("<I", 100_001 + level)
    return Raw(out)


def code(value: Any) -> bytes:
    """The instructions for a plain value, protocol 2."""
    if isinstance(value, Raw):
        return bytes(value)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) < 256:
            return b"\x8a" + bytes([len(data)]) + data
        return b"\x8b" + struct.pack("<i", len(data)) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, list):
        return b"](" + b"".join(map(code, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"
    assert isinstance(value, tuple)
    return b"(" + b"".join(map(code, value)) + b"t"


def pickled(value: Any, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + code(value) + b"."


def archive(
    pickle: bytes | None,
    *,
    folder: str = "archive",
    folder_name: str | None = None,
    records: Mapping[str, bytes] | None = None,
    extra_records: Iterable[tuple[str, bytes]] = (),
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A hand-made ``torch.save`` file: the pickle, its storages, and extra records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zip_file:
        if pickle is not None:
            zip_file.writestr(
                zipfile.ZipInfo(folder_name or f"{folder}/data.pkl"), pickle, compression
            )
        for key, data in ({"0": FLOATS} if records is None else records).items():
            zip_file.writestr(zipfile.ZipInfo(f"{folder}/data/{key}"), data, compression)
        for extra, data in extra_records:
            zip_file.writestr(zipfile.ZipInfo(extra), data, compression)
        zip_file.writestr(zipfile.ZipInfo(f"{folder}/version"), b"3\n", compression)
    return file.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    return archive(pickled(value), **options)
