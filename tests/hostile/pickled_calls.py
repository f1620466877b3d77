"""Pickles that call something, name something, or use the pickle machine wrongly."""

import random
from collections.abc import Iterator
from typing import Any

from kinds import CANARY, Kinds
from pickles import Raw, archive, call, code, made, name, namespace, ordered, saved, tensor

KINDS = Kinds()


# Calls with side effects, each with arguments that would create the canary file.
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
    """Contents with a value at every place where a steer file may have one."""
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


@KINDS.add
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


@KINDS.add
def names_only(rng: random.Random) -> bytes:
    path, _ = rng.choice(GADGETS)
    return saved(rng.choice(list(places(name(path), rng))))


@KINDS.add
def text_protocol(rng: random.Random) -> bytes:
    path, _ = rng.choice(GADGETS)
    module, _, attribute = path.rpartition(".")
    head = f"c{module}\n{attribute}\n(S'touch {CANARY}'\ntR.".encode()
    return archive(rng.choice([head, b"(dp0\n" + head, b"(lp0\n" + head[:-1] + b"a."]))


@KINDS.add
def extensions(rng: random.Random) -> bytes:
    return archive(
        b"\x80\x02" + rng.choice([b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\0\0\0"]) + b"."
    )


@KINDS.add
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


@KINDS.add
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


@KINDS.add
def noise(rng: random.Random) -> bytes:
    return archive(b"\x80\x02" + rng.randbytes(rng.randrange(1, 400)))
