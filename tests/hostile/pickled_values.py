"""Checkpoints with values, shapes, texts and numbers that no steer has."""

import random
import struct

from kinds import CANARY, TERMINAL, Kinds
from pickled_calls import places
from pickles import Raw, call, code, made, name, namespace, ordered, saved, shared, storage, tensor

KINDS = Kinds()


@KINDS.add
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
    type_word = rng.choice(["storage", "storage", "module", ""])
    return saved(tensor(of=storage(key, count, kind, type_word)))


@KINDS.add
def odd_persistent(rng: random.Random) -> bytes:
    persistent_id = rng.choice([(), ("storage",), "storage", 5, None, [1], ("storage",) * 9])
    return saved(tensor(of=Raw(code(persistent_id) + b"Q")))


@KINDS.add
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
    wrap = rng.choice([lambda t: t, lambda t: {3: t}, lambda t: [None, {"add_vec": t}, 1]])
    return saved(wrap(tensor(size, stride, offset)))


@KINDS.add
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


@KINDS.add
def odd_values(rng: random.Random) -> bytes:
    special = rng.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0"])
    kind, width = rng.choice(
        [("Float", 4), ("Double", 8), ("Half", 2), ("BFloat16", 2), ("Int", 4), ("Long", 8)]
    )
    of = storage("0", 16 // width, f"torch.{kind}Storage")
    wrap = rng.choice([lambda t: {3: t}, lambda t: t])
    return saved(wrap(tensor((16 // width,), (1,), of=of)), records={"0": special * 4})


@KINDS.add
def shared_deep(rng: random.Random) -> bytes:
    """Sixty nested pairs, each with the previous one twice, at every place of a value."""
    of = rng.choice([code("ha"), code(()), code(1.5), tensor(), code("x" * 1000)])
    return saved(rng.choice(list(places(shared(rng.choice([24, 60, 500]), of), rng))))


@KINDS.add
def shared_lists(rng: random.Random) -> bytes:
    out = b"]r" + struct.pack("<I", 0)
    for level in range(60):
        at = struct.pack("<I", level)
        out += b"](j" + at + b"j" + at + b"er" + struct.pack("<I", level + 1)
    return saved(rng.choice(list(places(Raw(out), rng))))


@KINDS.add
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


@KINDS.add
def holds_itself(rng: random.Random) -> bytes:
    value = rng.choice(
        [b"]q\x00h\x00a", b"}q\x00Nh\x00s", b"}q\x00K\x01h\x00s", b"]q\x00(h\x00h\x00h\x00e"]
    )
    return saved(rng.choice(list(places(Raw(value), rng))))


@KINDS.add
def own_items(rng: random.Random) -> bytes:
    """An OrderedDict whose attributes shadow the methods of a dict."""
    attribute = rng.choice(["items", "keys", "values", "get", "__len__", "__iter__", "__class__"])
    huge = tensor((500_000_000,), (0,))
    value = rng.choice([name("collections.OrderedDict"), [], {}, 5, "x"])
    filled = ordered((0, rng.choice([huge, tensor()])), state={attribute: value})
    return saved(rng.choice([filled, [None, filled, 1], {"layer_activations": filled}]))


@KINDS.add
def large_numbers(rng: random.Random) -> bytes:
    number = rng.choice(
        [2**63, -(2**63) - 1, 10**400, 10**600, 2 ** (8 * 5000), 1e308, float("inf"), float("nan")]
    )
    field = rng.choice(["epsilon", "dummy_steer", "adaptor_class", "model_name", "training_steer"])
    arguments = namespace(**{"epsilon": 0.1, field: number})
    return saved(
        rng.choice([[arguments, {"add_vec": tensor((1, 4), (4, 1))}, 1], {number: tensor()}])
    )


@KINDS.add
def large_texts(rng: random.Random) -> bytes:
    text = rng.choice(["x", "[", "9", "\x1b", "0-9,", "é"]) * rng.choice([1000, 200_000, 900_000])
    return saved(rng.choice(list(places(Raw(code(text[:900_000])), rng))))


@KINDS.add
def terminal_texts(rng: random.Random) -> bytes:
    return saved(rng.choice(list(places(Raw(code(rng.choice(TERMINAL))), rng))))


@KINDS.add
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


@KINDS.add
def odd_layers(rng: random.Random) -> bytes:
    layers = [-1, 10**9, 2**62, True, 1.0, float("nan"), None, "1", "01", "", 9999, 0.5]
    chosen = rng.sample(layers, rng.randrange(1, 4))
    wrap = {layer: tensor() for layer in chosen}
    return saved(rng.choice([wrap, {"layer_activations": wrap}]))


@KINDS.slow
def many_tensors(rng: random.Random) -> bytes:
    count = rng.choice([1001, 3000])
    return saved({layer: tensor() for layer in range(count)})


@KINDS.slow
def one_tensor_often(rng: random.Random) -> bytes:
    """One record of a megabyte under many layers: memory that the file does not have."""
    one = Raw(tensor((2**18,), (1,), of=storage("0", 2**18)) + b"q\x00")
    rest = b"".join(code(layer) + b"h\x00" for layer in range(1, 9000))
    return saved(Raw(b"}(" + code(0) + one + rest + b"u"), records={"0": bytes(2**20)})


@KINDS.add
def like_tensors(rng: random.Random) -> bytes:
    """Namespaces with a tensor's attributes and values that must not be traversed."""
    inner = rng.choice([shared(60, code(())), shared(24, code("ha")), Raw(code("\x1b[2J" * 50))])
    attributes = {"shape": (), "dtype": 1, "device": "cpu", "x": inner}
    content = dict(rng.sample(sorted(attributes.items()), rng.randrange(1, 4))) | {"dtype": inner}
    return saved(rng.choice(list(places(namespace(**content), rng))))


@KINDS.add
def without_values(rng: random.Random) -> bytes:
    """Shapes without values, since a size is 0, and with a layer for every number below 2^27."""
    big = rng.choice([2**20, 2**27, 2**40])
    sizes = [0, *(rng.choice([1, big]) for _ in range(rng.choice([0, 1, 2, 3])))]
    rng.shuffle(sizes)
    return saved(tensor(tuple(sizes), (1,) * len(sizes)))


@KINDS.add
def views_with_metadata(rng: random.Random) -> bytes:
    """Tensors with metadata that changes how their values are read."""
    metadata = rng.choice(
        [
            *({"neg": 1}, {"conj": True}, {"neg": True, "x": 1}, {1: True}, "neg", ["neg"], 5),
            call("os.system", f"touch {CANARY}"),
        ]
    )
    hooks = call("collections.OrderedDict")
    arguments = (storage(), 0, (4,), (1,), False, hooks, metadata)
    return saved({3: call("torch._utils._rebuild_tensor_v2", *arguments)})
