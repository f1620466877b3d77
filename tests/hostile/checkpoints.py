"""Hostile and damaged files of ``torch.save``: kinds by name, each with as many as are wanted.

``CANARY`` in a text stands for a file that must never come to be.
"""

import io
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from pickles import (
    FLOATS,
    Raw,
    archive,
    call,
    code,
    made,
    name,
    namespace,
    ordered,
    pickled,
    saved,
    shared,
    storage,
    tensor,
)

CANARY = "CANARY"
TERMINAL = (
    "\x1b]8;;http://x\x07link\x1b]8;;\x07",
    "\x1b[2J\x1b[31m",
    "\x07\x08\r",
    "\x9b31m",
    "\u202egnp.exe",
    "[bold red]x[/] [/bold] [link=file:///etc/passwd]y[/link]",
    "a\nb\n\tc",
    "\u200b\u2028\ufeff",
    "\ud800",
)

# Calls that do something, each with arguments that would leave the canary behind.
GADGETS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("os.system", (f"touch {CANARY}",)),
    ("posix.system", (f"touch {CANARY}",)),
    ("subprocess.Popen", (["touch", CANARY],)),
    ("subprocess.check_output", (["touch", CANARY],)),
    ("builtins.eval", (f"open('{CANARY}','w')",)),
    ("__builtin__.eval", (f"open('{CANARY}','w')",)),
    ("builtins.exec", (f"open('{CANARY}','w')",)),
    ("builtins.open", (CANARY, "w")),
    ("io.open", (CANARY, "w")),
    ("builtins.getattr", (1, "__class__")),
    ("builtins.bytearray", (3 * 2**30,)),
    ("builtins.range", (2**40,)),
    ("pathlib.Path.touch", (CANARY,)),
    ("os.mkdir", (CANARY,)),
    ("os.posix_spawn", ("/bin/touch", ["touch", CANARY], {})),
    ("shutil.copyfile", ("/etc/passwd", CANARY)),
    ("runpy._run_code", (f"open('{CANARY}','w')", {})),
    ("timeit.timeit", (f"open('{CANARY}','w')",)),
    ("cProfile.run", (f"open('{CANARY}','w')",)),
    ("code.interact", ()),
    ("importlib.import_module", ("antigravity",)),
    ("numpy.save", (CANARY, 1)),
    ("numpy.core.multiarray._reconstruct", (name("numpy.ndarray"), (0,), "b")),
    ("torch.load", (CANARY,)),
    ("torch.save", (1, CANARY)),
    ("torch.hub.load", ("x/y", "z")),
    ("torch.serialization.add_safe_globals", ([name("os.system")],)),
    ("torch._utils._rebuild_device_tensor_from_numpy", ()),
    ("torch.storage._load_from_bytes", (b"".decode(),)),
    ("torch.FloatStorage", (2**31,)),
    ("torch.empty", (2**40,)),
    ("torch._utils._rebuild_sparse_tensor", (1, ())),
    ("torch.jit.load", (CANARY,)),
    ("types.FunctionType", ()),
    ("operator.attrgetter", ("system",)),
    ("functools.partial", (name("os.system"), f"touch {CANARY}")),
    ("argparse.FileType", ("w",)),
    ("argparse.ArgumentParser", ()),
    ("collections.Counter", ("a" * 10,)),
    ("vllm_steer.files.torch_file.load", (CANARY,)),
)


def places(evil: Raw, rng: random.Random) -> Iterator[Any]:
    """Contents that hold a value wherever a steer's file may hold one."""
    state = {"projector1": tensor((1, 2, 2), (4, 2, 1)), "projector2": evil}
    yield evil
    yield [namespace(epsilon=evil), {"add_vec": tensor((1, 4), (4, 1))}, 1]
    yield [namespace(epsilon=0.1), state, 1]
    yield [namespace(epsilon=0.1), {"add_vec": tensor((1, 4), (4, 1))}, evil]
    yield [evil, {"add_vec": tensor((1, 4), (4, 1))}]
    yield {rng.randrange(40): evil}
    yield {1: tensor(), evil: tensor()}
    yield {"layer_activations": {1: tensor()}, "layer_type": evil}
    yield tensor(of=evil)
    yield tensor(hooks=evil)
    yield tensor(size=(evil,))
    yield call("torch._utils._rebuild_parameter", evil, False, ())
    yield made("argparse.Namespace", evil)
    yield made("steering_vectors.steering_vector.SteeringVector", {"layer_activations": evil})
    yield ordered((1, evil))
    yield Raw(code(("storage", evil, "0", "cpu", 4)) + b"Q")


def calls(rng: random.Random) -> bytes:
    path, arguments = rng.choice(GADGETS)
    form = rng.randrange(6)
    evil = call(path, *arguments)
    if form == 1:
        evil = Raw(name(path) + code(arguments) + b"\x81")
    elif form == 2:
        module, _, attribute = path.rpartition(".")
        made_of = b"".join(map(code, arguments))
        evil = Raw(b"(" + made_of + b"i" + module.encode() + b"\n" + attribute.encode() + b"\n")
    elif form == 3:
        module, _, attribute = path.rpartition(".")
        evil = Raw(code(module) + code(attribute) + b"\x93" + code(arguments) + b"R")
    elif form == 4:
        evil = Raw(b"(" + name(path) + b"".join(map(code, arguments)) + b"o")
    elif form == 5:
        evil = Raw(b"}" + code("__setstate__") + name(path) + b"s" + code(arguments) + b"b")
    return saved(rng.choice(list(places(evil, rng))))


def names_only(rng: random.Random) -> bytes:
    path, _ = rng.choice(GADGETS)
    return saved(rng.choice(list(places(name(path), rng))))


def text_protocol(rng: random.Random) -> bytes:
    path, _ = rng.choice(GADGETS)
    module, _, attribute = path.rpartition(".")
    head = f"c{module}\n{attribute}\n(S'touch {CANARY}'\ntR.".encode()
    return archive(rng.choice([head, b"(dp0\n" + head, b"(lp0\n" + head[:-1] + b"a."]))


def extensions(rng: random.Random) -> bytes:
    return archive(
        b"\x80\x02" + rng.choice([b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\0\0\0"]) + b"."
    )


def other_case(rng: random.Random) -> bytes:
    """The harmless pickle under one name, the hostile one under another of other case."""
    spelt = "".join(rng.choice([c, c.upper()]) for c in "data.pkl")
    spelt = spelt if spelt != "data.pkl" else "DATA.PKL"
    evil = pickled(
        call(*rng.choice([("os.system", f"touch {CANARY}"), ("builtins.bytearray", 3 << 30)]))
    )
    decoy = rng.choice(["archive/x/data.pkl", "x/data.pkl", "archive/data.pkl", "data.pkl"])
    return archive(evil, where=f"archive/{spelt}", more=[(decoy, pickled(tensor()))])


def two_pickles(rng: random.Random) -> bytes:
    other = rng.choice(
        ["b/data.pkl", "archive/a/data.pkl", "data.pkl", "archive//data.pkl", "/data.pkl"]
    )
    return archive(pickled(tensor()), more=[(other, pickled(call("os.system", f"touch {CANARY}")))])


def same_name_twice(rng: random.Random) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evil = pickled(call("os.system", f"touch {CANARY}"))
        first, second = rng.sample([evil, pickled(tensor())], 2)
        return archive(first, more=[("archive/data.pkl", second)])


def odd_folder(rng: random.Random) -> bytes:
    where = rng.choice(
        ["data.pkl", "a/b/data.pkl", "../data.pkl", "/data.pkl", "a\\data.pkl", "\x1b[31m/data.pkl"]
    )
    return archive(pickled(tensor()), where=where)


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


def cut_short(rng: random.Random) -> bytes:
    data = saved(tensor())
    return data[: rng.randrange(4, len(data))]


def junk_around(rng: random.Random) -> bytes:
    junk = rng.randbytes(rng.randrange(1, 3000))
    data = saved(tensor())
    return rng.choice(
        [b"PK\x03\x04" + junk + data, data + junk, data[:40] + junk + data[40:], data + data]
    )


def overlapping(rng: random.Random) -> bytes:
    """Directory entries that point to one record."""
    data = bytearray(saved(tensor(), more=[(f"archive/data/{i}", FLOATS) for i in range(1, 4)]))
    entries = [i for i in range(len(data)) if data.startswith(b"PK\x01\x02", i)]
    first, second = rng.sample(entries, 2)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    if rng.random() < 0.5:
        data[second + 20 : second + 28] = struct.pack("<II", 1 << 20, 1 << 20)
    return bytes(data)


def zip64_lies(rng: random.Random) -> bytes:
    data = saved(tensor())
    end = data.rfind(b"PK\x05\x06")
    size, at = rng.choice([(1 << 60, 0), (10, 1 << 62), (0, 0), (len(data), 0)])
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 9, 9, size, at)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, rng.choice([end, 0, 1 << 63]), 1)
    return data[:end] + record + locator + data[end:]


def many_records(rng: random.Random) -> bytes:
    count = rng.choice([3000, 20_000, 30_000])
    return archive(pickled(tensor()), more=[(f"archive/{i}", b"") for i in range(count)])


def compressed(rng: random.Random) -> bytes:
    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    zeros = {"0": bytes(rng.choice([16, 1 << 20, 1 << 24]))}
    return saved(tensor(), records=zeros, compression=method)


def encrypted(rng: random.Random) -> bytes:
    data = bytearray(saved(tensor()))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + at] |= 1
            place = data.find(mark, place + 1) if rng.random() < 0.8 else -1
    return bytes(data)


def strange_records(rng: random.Random) -> bytes:
    text = rng.choice(
        [t for t in TERMINAL if t.isascii()] + ["../../etc/passwd", "a" * 60_000, "\u202e"]
    )
    kind = rng.choice(["", ".npy", "/data.pkl", "/constants.pkl", "/code/__torch__.py"])
    return archive(rng.choice([None, pickled(tensor())]), more=[(text + kind, b"x")])


def odd_storage(rng: random.Random) -> bytes:
    key = rng.choice(
        ["1", "../0", "/etc/passwd", "0/../0", "", "\x1b[31m", 0, None, ("0",), 10**30]
    )
    count = rng.choice([4, 5, -1, 0, 2**31, 2**62, 2**63, 10**100, 1.5, "4", None, True])
    kind = rng.choice(
        ["torch.FloatStorage", "torch.LongStorage", "torch.QInt8Storage", "torch.Tensor"]
    )
    if key == "1" and count == 4 and kind == "torch.FloatStorage":
        key = "9"
    word = rng.choice(["storage", "storage", "module", ""])
    return saved(tensor(of=storage(key, count, kind, word)))


def odd_persistent(rng: random.Random) -> bytes:
    given = rng.choice([(), ("storage",), "storage", 5, None, [1], ("storage",) * 9])
    return saved(tensor(of=Raw(code(given) + b"Q")))


def odd_shape(rng: random.Random) -> bytes:
    big = rng.choice([5, 500_000_000, 2**31, 2**62, 2**63, 10**40])
    size, stride, offset = rng.choice(
        [
            ((big,), (0,), 0),
            ((big,), (1,), 0),
            ((4,), (big,), 0),
            ((4,), (1,), big),
            ((-4,), (1,), 0),
            ((4,), (-1,), 3),
            ((4,), (1,), -1),
            ((big, big), (0, 0), 0),
            ((1,) * 70, (1,) * 70, 0),
            ((2**16,) * 8, (0,) * 8, 0),
            ((4,), (), 0),
            ((), (1,), 0),
            ([4], [1], 0),
            ((4.0,), (1,), 0),
            ((True,), (1,), 0),
            (4, 1, 0),
            (None, None, None),
            ("4", "1", "0"),
            ((0, big), (1, 1), 0),
        ]
    )
    held = rng.choice([lambda t: t, lambda t: {3: t}, lambda t: [None, {"add_vec": t}, 1]])
    return saved(held(tensor(size, stride, offset)))


def odd_arguments(rng: random.Random) -> bytes:
    count = rng.choice([0, 1, 2, 3, 5, 9])
    arguments = tuple(rng.choice([storage(), 0, (4,), (1,), None, "x"]) for _ in range(count))
    path = rng.choice(
        [
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_parameter",
            "collections.OrderedDict",
        ]
    )
    return saved(call(path, *arguments))


def odd_values(rng: random.Random) -> bytes:
    special = rng.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0"])
    kind, width = rng.choice(
        [("Float", 4), ("Double", 8), ("Half", 2), ("BFloat16", 2), ("Int", 4), ("Long", 8)]
    )
    of = storage("0", 16 // width, f"torch.{kind}Storage")
    held = rng.choice([lambda t: {3: t}, lambda t: t])
    return saved(held(tensor((16 // width,), (1,), of=of)), records={"0": special * 4})


def shared_deep(rng: random.Random) -> bytes:
    """Sixty pairs, each holding the one before twice, wherever a value may stand."""
    of = rng.choice([code("ha"), code(()), code(1.5), tensor(), code("x" * 1000)])
    return saved(rng.choice(list(places(shared(rng.choice([24, 60, 500]), of), rng))))


def shared_lists(rng: random.Random) -> bytes:
    out = b"]r" + struct.pack("<I", 0)
    for level in range(60):
        at = struct.pack("<I", level)
        out += b"](j" + at + b"j" + at + b"er" + struct.pack("<I", level + 1)
    return saved(rng.choice(list(places(Raw(out), rng))))


def nested(rng: random.Random) -> bytes:
    depth = rng.choice([33, 500, 100_000, 300_000])
    value = rng.choice(
        [
            b")" + b"\x85" * depth,
            b"]" * depth + b"a" * (depth - 1),
            (b"}N" * depth)[:-1] + b"s" * (depth - 1),
        ]
    )
    return saved(rng.choice(list(places(Raw(value), rng))))


def holds_itself(rng: random.Random) -> bytes:
    value = rng.choice(
        [b"]q\x00h\x00a", b"}q\x00Nh\x00s", b"}q\x00K\x01h\x00s", b"]q\x00(h\x00h\x00h\x00e"]
    )
    return saved(rng.choice(list(places(Raw(value), rng))))


def own_items(rng: random.Random) -> bytes:
    """An OrderedDict whose attributes stand before a dict's methods."""
    attribute = rng.choice(["items", "keys", "values", "get", "__len__", "__iter__", "__class__"])
    huge = tensor((500_000_000,), (0,))
    value = rng.choice([name("collections.OrderedDict"), [], {}, 5, "x"])
    filled = ordered((0, rng.choice([huge, tensor()])), state={attribute: value})
    return saved(rng.choice([filled, [None, filled, 1], {"layer_activations": filled}]))


def large_numbers(rng: random.Random) -> bytes:
    number = rng.choice(
        [2**63, -(2**63) - 1, 10**400, 10**600, 2 ** (8 * 5000), 1e308, float("inf"), float("nan")]
    )
    where = rng.choice(["epsilon", "dummy_steer", "adaptor_class", "model_name", "training_steer"])
    said = namespace(**{"epsilon": 0.1, where: number})
    return saved(rng.choice([[said, {"add_vec": tensor((1, 4), (4, 1))}, 1], {number: tensor()}]))


def large_texts(rng: random.Random) -> bytes:
    text = rng.choice(["x", "[", "9", "\x1b", "0-9,", "é"]) * rng.choice([1000, 200_000, 900_000])
    return saved(rng.choice(list(places(Raw(code(text[:900_000])), rng))))


def terminal_texts(rng: random.Random) -> bytes:
    return saved(rng.choice(list(places(Raw(code(rng.choice(TERMINAL))), rng))))


def terminal_keys(rng: random.Random) -> bytes:
    text = rng.choice(TERMINAL)
    add = tensor((1, 4), (4, 1))
    return saved(
        rng.choice(
            [
                {text: tensor()},
                {1: tensor(), text: tensor()},
                [None, {text: add}, 1],
                [namespace(**{"epsilon": 0.1, "x": 1}), {"add_vec": add, text: 1}, 1],
                {"layer_activations": {1: tensor()}, text: 1},
                [made("argparse.Namespace", {text: text, "epsilon": text}), {"add_vec": add}, 1],
            ]
        )
    )


def odd_layers(rng: random.Random) -> bytes:
    layers = [-1, 10**9, 2**62, True, 1.0, float("nan"), None, "1", "01", "", 9999, 0.5]
    chosen = rng.sample(layers, rng.randrange(1, 4))
    held = {layer: tensor() for layer in chosen}
    return saved(rng.choice([held, {"layer_activations": held}]))


def odd_classes(rng: random.Random) -> bytes:
    """Plain classes with states that would change how they are read."""
    attribute = rng.choice(
        ["__class__", "__dict__", "__reduce__", "__getattr__", "__del__", "epsilon"]
    )
    cls = rng.choice(
        [
            "argparse.Namespace",
            "steering_vectors.steering_vector.SteeringVector",
            "collections.OrderedDict",
        ]
    )
    state = rng.choice([{attribute: name(cls)}, (None, {attribute: 1}), [1], "x", {1: 2}, None])
    value = made(cls, state)
    return saved(rng.choice([value, [value, {"add_vec": tensor((1, 4), (4, 1))}, 1]]))


def odd_machine(rng: random.Random) -> bytes:
    """Programs that use the stack and the memo wrongly."""
    programs = [
        b"h\x00.",
        b"j\xff\xff\xff\xff.",
        b"t.",
        b"(.",
        b"((((.",
        b"R.",
        b"b.",
        b"N.N.",
        b"NN.",
        b"0.",
        b"N0.",
        b"N2.",
        b"1.",
        b"}Ns.",
        b"}(Nu.",
        b"]N(u.",
        b"NNs.",
        b"Na.",
        b"(Ne.",
        b"q\x00.",
        b"\x94.",
        b"\x95" + bytes(8) + b".",
        b"]q\x00q\x01h\x01.",
        b"cargparse\nNamespace\n.",
        b"(cargparse\nNamespace\no.",
        b"cargparse\nNamespace\n)R.",
        b"ccollections\nOrderedDict\n)\x81.",
        b"ccollections\nOrderedDict\n}R.",
        b"\x8a\xff" + b"\x01" * 255 + b".",
        b"\x8b\x00\x00\x00\x7f.",
        b"X\xff\xff\xff\xff.",
        b"T\xff\xff\xff\x7f.",
        b"\x8d" + b"\xff" * 8 + b".",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x96" + b"\xff" * 8 + b".",
        b"B\xff\xff\xff\x7f.",
        b"\x8f(Nq\x00\x90.",
        b"Q.",
        b"NQ.",
        b"P0\n.",
        b"I9" + b"9" * 5000 + b"\n.",
        b"L9" + b"9" * 5000 + b"L\n.",
        b"S'\\x'\n.",
        b"V\\ud800\n.",
        b"Fnan\n.",
        b"",
        b"\x80",
        b"\x80\xff.",
        b"\xff\xff",
    ]
    start = rng.choice([b"\x80\x02", b"\x80\x05", b"\x80\x00", b""])
    return archive(start + rng.choice(programs))


def noise(rng: random.Random) -> bytes:
    return archive(b"\x80\x02" + rng.randbytes(rng.randrange(1, 400)))


def many_tensors(rng: random.Random) -> bytes:
    count = rng.choice([1001, 3000])
    return saved({layer: tensor() for layer in range(count)})


def one_tensor_often(rng: random.Random) -> bytes:
    """One record of a megabyte under many layers: memory that the file does not have."""
    one = Raw(tensor((2**18,), (1,), of=storage("0", 2**18)) + b"q\x00")
    rest = b"".join(code(layer) + b"h\x00" for layer in range(1, 9000))
    return saved(Raw(b"}(" + code(0) + one + rest + b"u"), records={"0": bytes(2**20)})


def big_endian(rng: random.Random) -> bytes:
    order = rng.choice([b"big", b"", b"\x1b", b"little\n"])
    return archive(pickled(tensor()), more=[("archive/byteorder", order)])


def large_pickle(rng: random.Random) -> bytes:
    return archive(b"\x80\x02" + b"N0" * rng.choice([499_990, 500_010, 2_000_000]) + b"N.")


def not_torch(rng: random.Random) -> bytes:
    """What people hand in by mistake."""
    pickle = pickled(call("os.system", f"touch {CANARY}"))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as written:
        written.addfile(tarfile.TarInfo("pickle"))
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


def bombs(rng: random.Random) -> bytes:
    """NumPy archives that unpack to far more than they are."""
    zeros = rng.choice([1 << 26, 1 << 28])
    order, rows = rng.random() < 0.5, zeros // 4 // 64
    text = f"{{'descr': '<f4', 'fortran_order': {order}, 'shape': ({rows}, 64), }}"
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr(zipfile.ZipInfo("W_dec.npy"), header + bytes(zeros), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def npz_headers(rng: random.Random) -> bytes:
    descr = rng.choice(
        [
            "'<f4'",
            "'|O'",
            "'<f16'",
            "'>c16'",
            "[('a', '<f4')]",
            "'|V999999999'",
            "'<M8[ns]'",
            "__import__('os')",
        ]
    )
    shape = rng.choice(
        [
            "(4, 4)",
            "(-4, 4)",
            "(4,)",
            "()",
            "(2**40, 4)",
            "(4, -1)",
            "(9999999999999, 9)",
            "(4, 4.0)",
            "[4, 4]",
            "(True, 4)",
            "((4,), 4)",
            "(" * 300,
        ]
    )
    order = rng.choice(["False", "True", "1", "None"])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()
    return archive(None, more=[("W_dec.npy", header + FLOATS * 4)])


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    made_by.__name__: made_by
    for made_by in (
        calls,
        names_only,
        text_protocol,
        extensions,
        other_case,
        two_pickles,
        same_name_twice,
        odd_folder,
        changed_zip,
        cut_short,
        junk_around,
        overlapping,
        zip64_lies,
        many_records,
        compressed,
        encrypted,
        strange_records,
        odd_storage,
        odd_persistent,
        odd_shape,
        odd_arguments,
        odd_values,
        shared_deep,
        shared_lists,
        nested,
        holds_itself,
        own_items,
        large_numbers,
        large_texts,
        terminal_texts,
        terminal_keys,
        odd_layers,
        odd_classes,
        odd_machine,
        noise,
        many_tensors,
        one_tensor_often,
        big_endian,
        large_pickle,
        not_torch,
        bombs,
        npz_headers,
    )
}
SLOW_TO_MAKE = {"many_records", "bombs", "large_pickle", "one_tensor_often", "many_tensors"}


def checkpoints(seed: int, each: int = 14) -> Iterator[tuple[str, bytes]]:
    """``each`` files of every kind, fewer of those that take time to make; by name."""
    for kind, make in KINDS.items():
        for number in range(3 if kind in SLOW_TO_MAKE else each):
            yield f"{kind}-{number}", make(random.Random(f"{seed} {kind} {number}"))
