"""Archives that are damaged or contradict themselves, and files that are no checkpoints."""

import io
import random
import struct
import tarfile
import warnings
import zipfile
import zlib

from kinds import CANARY, TERMINAL, Kinds
from pickles import FLOATS, archive, call, pickled, saved, tensor

KINDS = Kinds()


@KINDS.add
def other_case(rng: random.Random) -> bytes:
    """The harmless pickle under one name, the hostile one under another of other case."""
    spelt = "".join(rng.choice([c, c.upper()]) for c in "data.pkl")
    spelt = spelt if spelt != "data.pkl" else "DATA.PKL"
    evil = pickled(
        call(*rng.choice([("os.system", f"touch {CANARY}"), ("builtins.bytearray", 3 << 30)]))
    )
    decoy = rng.choice(["archive/x/data.pkl", "x/data.pkl", "archive/data.pkl", "data.pkl"])
    return archive(evil, folder_name=f"archive/{spelt}", extra_records=[(decoy, pickled(tensor()))])


@KINDS.add
def two_pickles(rng: random.Random) -> bytes:
    other = rng.choice(
        ["b/data.pkl", "archive/a/data.pkl", "data.pkl", "archive//data.pkl", "/data.pkl"]
    )
    return archive(
        pickled(tensor()), extra_records=[(other, pickled(call("os.system", f"touch {CANARY}")))]
    )


@KINDS.add
def same_name_twice(rng: random.Random) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evil = pickled(call("os.system", f"touch {CANARY}"))
        first, second = rng.sample([evil, pickled(tensor())], 2)
        return archive(first, extra_records=[("archive/data.pkl", second)])


@KINDS.add
def odd_folder(rng: random.Random) -> bytes:
    folder = rng.choice(
        ["data.pkl", "a/b/data.pkl", "../data.pkl", "/data.pkl", "a\\data.pkl", "\x1b[31m/data.pkl"]
    )
    return archive(pickled(tensor()), folder_name=folder)


@KINDS.add
def changed_zip(rng: random.Random) -> bytes:
    """One field of a header, of the directory or of the end overwritten."""
    data = bytearray(saved(tensor()))
    marks = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"]
    at = data.find(rng.choice(marks))
    at = rng.choice([at, data.find(b"PK\x01\x02", at + 1) if at >= 0 else at])
    field = rng.randrange(4, 46)
    value = rng.choice(
        [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x01\0\0\0", struct.pack("<I", rng.getrandbits(32))]
    )
    data[at + field : at + field + len(value)] = value
    return bytes(data)


@KINDS.add
def cut_short(rng: random.Random) -> bytes:
    data = saved(tensor())
    return data[: rng.randrange(4, len(data))]


@KINDS.add
def junk_around(rng: random.Random) -> bytes:
    junk = rng.randbytes(rng.randrange(1, 3000))
    data = saved(tensor())
    return rng.choice(
        [b"PK\x03\x04" + junk + data, data + junk, data[:40] + junk + data[40:], data + data]
    )


@KINDS.add
def overlapping(rng: random.Random) -> bytes:
    """Directory entries that point to one record."""
    data = bytearray(
        saved(tensor(), extra_records=[(f"archive/data/{i}", FLOATS) for i in range(1, 4)])
    )
    entries = [i for i in range(len(data)) if data.startswith(b"PK\x01\x02", i)]
    first, second = rng.sample(entries, 2)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    if rng.random() < 0.5:
        data[second + 20 : second + 28] = struct.pack("<II", 1 << 20, 1 << 20)
    return bytes(data)


@KINDS.add
def zip64_lies(rng: random.Random) -> bytes:
    data = saved(tensor())
    end = data.rfind(b"PK\x05\x06")
    size, at = rng.choice([(1 << 60, 0), (10, 1 << 62), (0, 0), (len(data), 0)])
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 9, 9, size, at)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, rng.choice([end, 0, 1 << 63]), 1)
    return data[:end] + record + locator + data[end:]


@KINDS.slow
def many_records(rng: random.Random) -> bytes:
    count = rng.choice([3000, 20_000, 30_000])
    return archive(pickled(tensor()), extra_records=[(f"archive/{i}", b"") for i in range(count)])


@KINDS.add
def compressed(rng: random.Random) -> bytes:
    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    zeros = {"0": bytes(rng.choice([16, 1 << 20, 1 << 24]))}
    return saved(tensor(), records=zeros, compression=method)


@KINDS.add
def encrypted(rng: random.Random) -> bytes:
    data = bytearray(saved(tensor()))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        offset = data.find(mark)
        while offset >= 0:
            data[offset + at] |= 1
            offset = data.find(mark, offset + 1) if rng.random() < 0.8 else -1
    return bytes(data)


@KINDS.add
def strange_records(rng: random.Random) -> bytes:
    text = rng.choice(
        [t for t in TERMINAL if t.isascii()] + ["../../etc/passwd", "a" * 60_000, "\u202e"]
    )
    kind = rng.choice(["", ".npy", "/data.pkl", "/constants.pkl", "/code/__torch__.py"])
    return archive(rng.choice([None, pickled(tensor())]), extra_records=[(text + kind, b"x")])


@KINDS.add
def big_endian(rng: random.Random) -> bytes:
    order = rng.choice([b"big", b"", b"\x1b", b"little\n"])
    return archive(pickled(tensor()), extra_records=[("archive/byteorder", order)])


@KINDS.slow
def large_pickle(rng: random.Random) -> bytes:
    return archive(b"\x80\x02" + b"N0" * rng.choice([499_990, 500_010, 2_000_000]) + b"N.")


@KINDS.add
def not_torch(rng: random.Random) -> bytes:
    """Files that users pass by mistake."""
    pickle = pickled(call("os.system", f"touch {CANARY}"))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return rng.choice(
        [
            pickle,
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + pickle,
            b"\x80\x04\x95" + pickle,
            b"\x1f\x8b" + zlib.compress(pickle),
            tar.getvalue(),
            "{}".encode("utf-16"),
            b"\xef\xbb\xbf{}",
            b"<html>" + TERMINAL[0].encode(),
            TERMINAL[1].encode() * 50,
            rng.randbytes(200),
            bytes(200),
            b"PK\x05\x06" + bytes(18),
            b"PK\x03\x04",
            b"PK\x07\x08" + bytes(50),
        ]
    )
