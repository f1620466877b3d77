"""Hostile, damaged and mistaken texts, labels, conversations, lexicons and lists of properties."""

import json
import random
from typing import Any

from kinds import CANARY, TERMINAL, Kinds

TEXT_FILES = Kinds()
PROPERTIES = "properties: {a: {steer: %s, judge: j, strengths: [%s]}}\nseen: [%s]\n"


def row(rng: random.Random, **fields: Any) -> str:
    """One row, in the form of one of the formats."""
    values = {"text": "x", "label": 1, **fields}
    pair = {"prompt": "a", "completion": "b", "label": 0, **fields}
    return rng.choice(
        [
            json.dumps(values) + "\n",
            json.dumps(pair) + "\n",
            json.dumps([values, pair]),
            "text,label\n" + ",".join(str(value) for value in values.values()) + "\n",
        ]
    )


@TEXT_FILES.slow
def long_lines(rng: random.Random) -> str:
    """Lines, cells and letters without an end."""
    long = rng.choice(["a", "[", '"', '"\\', "a,", "1", "\u2028", "\\ud83d"]) * (9 << 20)
    return rng.choice(["", '{"text": "', '["', 'text,label\n"', "positive: ["]) + long


@TEXT_FILES.add
def labels(rng: random.Random) -> str:
    unusual_labels = [
        "0_1",
        "\u0661",
        "\uff11",
        "1e999",
        "NaN",
        True,
        None,
        9**99,
        [1],
        {"a": 1},
        "",
        " ",
        "-0",
    ]
    return row(rng, label=rng.choice(unusual_labels))


@TEXT_FILES.add
def twice(rng: random.Random) -> str:
    return rng.choice(
        [
            '{"text": "x", "label": 1, "label": -1}\n',
            '{"text": "x", "text": "y", "label": 1}\n',
            '[{"text": "x", "label": 1, "label": -1}]',
            "text,label,label\nx,1,-1\n",
            '{"messages": [{"role": "user", "role": "assistant", "content": "x"}], "label": 1}\n',
            "positive: [a]\nnegative: [b]\npositive: [c]\n",
            PROPERTIES % ("x", 1, "a") + "seen: [a]\n",
        ]
    )


@TEXT_FILES.add
def numbers(rng: random.Random) -> str:
    number = rng.choice(
        ["9" * 5000, "1" + "0" * 400, "1e999", "-1e999", "1E-999", "-", "1_0", "01"]
    )
    return rng.choice(
        [
            f'{{"text": "x", "label": {number}}}\n',
            f"[{number}]",
            f"text,label\nx,{number}\n",
            PROPERTIES % ("x", number, "a"),
            f"positive: [{number}]\nnegative: [b]\n",
        ]
    )


@TEXT_FILES.add
def nested(rng: random.Random) -> str:
    depth = rng.choice([33, 3000, 300_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    value = opened * depth + "1" + closed * rng.choice([0, depth])
    return rng.choice(["%s", '{"text": %s}\n', "positive: %s\nnegative: [a]\n"]) % value


@TEXT_FILES.add
def bombs(rng: random.Random) -> str:
    lines = ["x0: &x0 [lol, lol]", *(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 60))]
    use = rng.choice(["positive: *x59\nnegative: [a]\n", PROPERTIES % ("*x59", 1, "*x59")])
    return "\n".join(lines) + "\n" + use


@TEXT_FILES.add
def terminal_texts(rng: random.Random) -> str:
    text = rng.choice(TERMINAL)
    key = rng.choice(["text", "label", "prompt", "completion", text])
    return rng.choice([row(rng, **{key: text}), PROPERTIES % (json.dumps(text), 1, "a")])


@TEXT_FILES.add
def paths(rng: random.Random) -> str:
    path = rng.choice(
        ["~nobody_here/x", '"a\\0b"', "x" * 5000, "/dev/zero", '"\\ud800"', f"$(touch {CANARY})"]
    )
    return rng.choice(
        [PROPERTIES % (path, 1, "a"), f"{PROPERTIES % ('x', 1, 'a')}examples: {{a: {path}}}"]
    )


@TEXT_FILES.add
def conversations(rng: random.Random) -> str:
    message = rng.choice(
        [
            {"role": "\ud800", "content": "x"},
            {"role": 1, "content": "x"},
            {"role": "user"},
            [],
            0,
            False,
            {"role": "x" * 100_000, "content": "x"},
            {"role": "user", "content": [1]},
            "x",
            None,
        ]
    )
    messages = rng.choice([message, [message], [message] * 2000])
    name = rng.choice(["messages", "conversation_history", "prompt", "completion"])
    return json.dumps({"prompt": "a", "completion": "b", "label": 1, name: messages}) + "\n"


@TEXT_FILES.add
def properties(rng: random.Random) -> str:
    return rng.choice(
        [
            PROPERTIES % ("x", "nan", "a"),
            PROPERTIES % ("x", '"1_0"', "a"),
            PROPERTIES % ("x", "1, " * 20_000, "a"),
            PROPERTIES % ("x", '"1-999999999"', "a"),
            PROPERTIES % ("x", 1, "a, " * 20_000),
            PROPERTIES % ("x", 1, "[a, [a]]"),
            PROPERTIES % ("x", 1, "a++a"),
            PROPERTIES % ("x", 1, "~"),
            PROPERTIES % ("x", 1, "a") + "demonstrations: " + "9" * 4000 + "\n",
            PROPERTIES % ("x", 1, "a") + "examples: {1: x}\n",
        ]
    )


@TEXT_FILES.add
def noise(rng: random.Random) -> bytes:
    return rng.choice([b"", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"text,label\n"]) + rng.randbytes(
        rng.randrange(300)
    )
