"""Hostile, damaged and mistaken steer configs."""

import json
import random

from kinds import TERMINAL, Kinds

CONFIGS = Kinds()
KEYS = (
    "path",
    "kind",
    "hidden_size",
    "variant",
    "epsilon",
    "fixed_columns",
    "columns",
    "layers",
    "site",
    "mode",
    "schedule",
    "orient",
    "rows",
    "feature",
    "hook",
    "default_strength",
    "base_model",
    "description",
)
STEER = "steers: {a: {path: a.safetensors}}\n"
PLACES = (
    "steers: %s\n",
    "steers: {a: %s}\n",
    "steers: {a: {path: a.safetensors, KEY: %s}}\n",
    STEER + "presets: %s\n",
    STEER + "presets: {p: %s}\n",
    STEER + "presets: {p: {a: %s}}\n",
    STEER + "presets: {p: {a: {strength: %s}}}\n",
    STEER + "presets: {p: {a: {layers: %s}}}\n",
    STEER + "default: %s\n",
    STEER + "limits: %s\n",
    STEER + "limits: {max_steers: %s}\n",
    STEER + "limits: {max_strength: %s}\n",
    STEER + "kernels: %s\n",
    "%s: 1\n",
    STEER + "%s: 1\n",
)


def place(rng: random.Random) -> str:
    return rng.choice(PLACES).replace("KEY", rng.choice(KEYS))


@CONFIGS.add
def bomb(rng: random.Random) -> str:
    """Aliases that expand to very many values, in every key."""
    depth = rng.choice([18, 30, 60])
    kind = rng.choice(["[*x%d, *x%d]", "{a: *x%d, b: *x%d}", "[*x%d, [*x%d]]"])
    lines = ["x0: &x0 " + rng.choice(["[lol, lol]", "lol", "{a: 1}", "1"])]
    lines += [f"x{i}: &x{i} " + kind % (i - 1, i - 1) for i in range(1, depth)]
    return "\n".join(lines) + "\n" + place(rng) % f"*x{depth - 1}"


@CONFIGS.add
def merge_bomb(rng: random.Random) -> str:
    depth = rng.choice([18, 30])
    lines = ["x0: &x0 {a: 1}"]
    lines += [f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}], b{i}: 1}}" for i in range(1, depth)]
    return "\n".join(lines) + "\n" + place(rng) % f"{{<<: *x{depth - 1}}}"


@CONFIGS.add
def holds_itself(rng: random.Random) -> str:
    return place(rng) % rng.choice(["&x [*x]", "&x {a: *x}", "&x [[*x, *x]]", "&x {<<: *x}"])


@CONFIGS.add
def nested(rng: random.Random) -> str:
    depth = rng.choice([33, 500, 5000, 100_000])
    pair = rng.choice(["[]", "{}"])
    opened = "[" * depth if pair == "[]" else "{a: " * depth
    closed = pair[1] * rng.choice([depth, 0])
    return place(rng) % (opened + closed)


@CONFIGS.add
def tags(rng: random.Random) -> str:
    tag = rng.choice(
        [
            "!!python/object/apply:os.system ['touch CANARY']",
            "!!python/object/new:os.system ['touch CANARY']",
            "!!python/name:os.system",
            "!!python/module:os",
            "!!python/object:argparse.Namespace {}",
            "!!python/tuple [1, 2]",
            "!!binary aGVsbG8=",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!pairs [a: 1, a: 2]",
            "!!timestamp 2026-01-01",
            "!!int x",
            "!!float x",
            "!!int ''",
            "!!bool x",
            "!!null x",
            "!!timestamp x",
            "!!binary \xff",
            "!unknown x",
            "! x",
            "!!merge <<",
        ]
    )
    return place(rng) % tag


@CONFIGS.add
def twice(rng: random.Random) -> str:
    key = rng.choice(["steers", "presets", "default", "limits"])
    doubled = rng.choice(
        [
            f"{STEER}{key}: {{}}\n{key}: {{}}\n",
            "steers: {a: {path: a.safetensors}, a: {path: b.safetensors}}\n",
            "steers: {a: {path: a.safetensors, path: b.safetensors}}\n",
            STEER + "presets: {p: {a: 1, a: 2}}\n",
            STEER + "presets: {p: {a: {strength: 1, strength: 2}}}\n",
            '{"steers": {"a": {"path": "a.safetensors"}}, "steers": {}}',
            '{"steers": {"a": {"path": "a.safetensors"}, "\\u0061": {"path": "b"}}}',
            STEER + "limits: {max_rank: 1, max_rank: 2}\n",
        ]
    )
    return doubled


@CONFIGS.add
def odd_numbers(rng: random.Random) -> str:
    number = rng.choice(
        [
            "1_0",
            "0x10",
            "0b1",
            "010",
            "1:30",
            "1e999",
            "-1e999",
            ".inf",
            ".nan",
            "9" * 5000,
            "9" * 50,
            "-0",
            "'١٢'",
            "'\uff11\uff12'",
            "1e-400",
            "true",
            "null",
            "''",
            "' '",
            "-1",
            "0",
            "1.5",
            "1" + "0" * 308 + ".0",
        ]
    )
    return place(rng) % number


@CONFIGS.add
def odd_types(rng: random.Random) -> str:
    value = rng.choice(
        ["[]", "{}", "[1, 2]", "{a: 1}", "null", "x", "2026-01-01", "[[]]", "''", "~"]
    )
    return place(rng) % value


@CONFIGS.add
def odd_paths(rng: random.Random) -> str:
    path = rng.choice(
        [
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            "/proc/self/environ",
            "/etc/passwd",
            "..",
            "/",
            "~nobody_here/x",
            "a\\0b",
            "x" * 5000,
            "/" * 5000,
            "\\ud800",
            "\\e[31m",
            "http://example.org/x",
            "file:///etc/passwd",
            "$(touch CANARY)",
            "",
            " ",
        ]
    )
    return f'steers: {{a: {{path: "{path}"}}}}\n'


@CONFIGS.add
def terminal_texts(rng: random.Random) -> str:
    text = json.dumps(rng.choice(TERMINAL))
    return place(rng) % text


@CONFIGS.add
def long_texts(rng: random.Random) -> str:
    return place(rng) % (
        rng.choice(["x", "a:1,", "0-9,", "é"]) * rng.choice([500, 50_000, 400_000])
    )


@CONFIGS.add
def many(rng: random.Random) -> str:
    count = rng.choice([33, 500, 5000])
    names = ", ".join(f"n{i}: {{path: a.safetensors}}" for i in range(count))
    mixes = ", ".join(f"p{i}: {{a: 1}}" for i in range(count))
    return rng.choice([f"steers: {{{names}}}\n", STEER + f"presets: {{{mixes}}}\n"])


@CONFIGS.add
def misspelt(rng: random.Random) -> str:
    key = rng.choice(
        ["steer", "Steers", "preset", "limit", "defaults", "kernel", "runtimes", "x" * 3000]
    )
    return rng.choice(
        [STEER + f"{key}: {{}}\n", f"steers: {{a: {{path: a.safetensors, {key}: 1}}}}\n"]
    )


@CONFIGS.add
def broken(rng: random.Random) -> str:
    return rng.choice(
        [
            "",
            "\n",
            "---\n---\n",
            "steers: [",
            "steers: }",
            "\t- a",
            "steers:\n\t a: 1",
            "%YAML 9.9\n---\n" + STEER,
            "- 1",
            "7",
            "x",
            "null",
            "# only a remark",
            "steers: 'unclosed",
            "steers: |\n a\nb",
            "? [1, 2]\n: 3",
            "{[1]: 2}",
            "steers: *gone",
            "&a &b x",
            '{"steers": NaN}',
            '{"steers": {"a": {"path": "x"}},}',
            '{"steers": ' + "1" * 5000 + "}",
            STEER + "...\nx: 1\n",
            "@x",
            "`x`",
            "\x00",
            "a: \x07",
        ]
    )


@CONFIGS.add
def noise(rng: random.Random) -> str:
    letters = "abst:{}[],&*!|>'\"%@`#-? \n\t0123456789.<\\e"
    return "".join(rng.choice(letters) for _ in range(rng.randrange(1, 300)))


@CONFIGS.add
def changed(rng: random.Random) -> str:
    text = "steers:\n  a: {path: a.safetensors, layers: 0-3}\npresets: {p: {a: 2}}\ndefault: p\n"
    at = rng.randrange(len(text))
    return (
        text[:at]
        + rng.choice(["", ":", "{", "[", "&x ", "*x", "!!", "\n", '"', "#"])
        + text[at + 1 :]
    )


ENCODINGS = ("utf-8", "utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7")


@CONFIGS.add
def encodings(rng: random.Random) -> bytes:
    text = "steers: {a: {path: é.safetensors}}\n"
    return text.encode(rng.choice(ENCODINGS)) + rng.choice(
        [b"", b"\xff", b"\xed\xa0\x80", b"\xc0\x80"]
    )
