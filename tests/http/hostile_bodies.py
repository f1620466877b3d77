"""Invalid and unusual requests: some hundred named kinds, with the expected status of each.

``REFUSED`` bodies request a steer that cannot be served: 400. ``DENIED`` ones lack the API key:
401. ``SERVED`` ones are valid in an unusual way: 200. ``SAME`` ones do not concern the plugin and
get the answer of an unsteered server. All follow from one seed.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

REFUSED, DENIED, SERVED, SAME = "refused", "denied", "served", "same"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
BASE: dict[str, Any] = {"model": "base", "prompt": "Once", "max_tokens": 2, "temperature": 0}
CONVERSATION = [{"role": "user", "content": "Once"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: BASE,
    CHAT: {"model": "base", "messages": CONVERSATION, "max_tokens": 2},
    MESSAGES: {"model": "base", "messages": CONVERSATION, "max_tokens": 2},
    RESPONSES: {"model": "base", "input": "Once", "max_output_tokens": 2},
    "/invocations": BASE,
    "/v1/chat/completions/batch": {"model": "base", "messages": [CONVERSATION], "max_tokens": 2},
}


@dataclass(frozen=True)
class Kind:
    """One request and its expected status."""

    name: str
    due: str
    body: bytes
    path: str = COMPLETIONS
    method: str = "POST"
    content_type: str | None = "application/json"
    key: str | None = "right"


@cache
def kinds(seed: int = 0) -> list[Kind]:
    """All of them; names are unique."""
    generator = random.Random(seed)
    makers = (
        wrong_types, wrong_texts, wrong_options, above_ceilings, near_misses, unlike_strengths,
        spellings, other_routes, other_requests, without_key, malformed, wrong_fields,
    )  # fmt: skip
    result = [kind for make in makers for kind in make()]
    result += [*random_steers(generator, 160), *random_bodies(generator, 80)]
    assert len({kind.name for kind in result}) == len(result)
    return result


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()


def with_literal(literal: str, place: str = "steer", body: dict[str, Any] = BASE) -> bytes:
    """A body with a value that Python cannot write as JSON."""
    field = f'"steer": {literal}' if place == "steer" else f'"vllm_xargs": {{"steer": {literal}}}'
    return json.dumps(body).encode()[:-1] + f", {field}}}".encode()


WRONG_TYPES = {
    "zero": "0", "one": "1", "negative": "-7", "float": "1.5", "exponent": "1e5", "true": "true",
    "false": "false", "nan": "NaN", "infinity": "Infinity", "minus-infinity": "-Infinity",
    "overflow": "1e999", "64-bits": str(2**64), "401-digits": str(10**400),
    "4000-digits": "9" * 4000, "negative-401-digits": str(-(10**400)), "list": "[]",
    "list-of-names": '["a"]', "list-of-pairs": '[["a", 3]]', "list-of-objects": '[{"a": 3}]',
    "list-of-null": "[null]", "nested-lists": "[" * 90 + "]" * 90,
    "long-list": json.dumps([1] * 9000),
    "list-of-nan": "[NaN]", "list-of-large": "[" + str(10**400) + "]",
}  # fmt: skip


def wrong_types() -> Iterator[Kind]:
    """A value that is neither text nor object, in both places, on every route, streamed or not."""
    for name, literal in WRONG_TYPES.items():
        for place in ("steer", "vllm_xargs"):
            for stream in (False, True):
                body = with_literal(literal, place, {**BASE, "stream": stream})
                yield Kind(f"type/{name}/{place}/stream={stream}", REFUSED, body)
    for path, body in BODIES.items():
        for name in ("one", "list", "true", "401-digits"):
            yield Kind(
                f"type/{name}{path}", REFUSED, with_literal(WRONG_TYPES[name], body=body), path
            )


WRONG_TEXTS = (
    "happy", "A", "NONE", "a:", ":1", "a:1,", ",a:1", "a,,b", "a:five", "a:1:2", "a:1_0", "a:0x1",
    "a:nan", "a:inf", "a:-infinity", "a:1e999", "a:1.", "a:+", "a:1 0", "a:\u0661", "a:\uff11",
    "a:1\u00a0", "a 1", "a=1", "a;b", "[1]", "[", "{", "{}}", '{"a"}', '{"a": 1', '{"a": NaN}',
    '{"a": null}', '{"happy": 1}', '{"a": [1]}', "a:1,b:1,c:1", "a:10.5", "friendly:4", "frindly",
    "friendly:x", "friendly:dynamic", "base:friendly", "\u202ea:1", "a\0", "\ud800", "a:\x1b[31m",
    "a:dynamic:", "a:dynamic:x", "a:dynamic:1:2", "a:dynamic:1:0.5:kl", "a:dynamic,a:1", "'a'",
    '"a:1"', "null", "true", "../a", "a/b", "%61", "a\u0301", "<script>", "a:1e39", "none,a",
)  # fmt: skip


def wrong_texts() -> Iterator[Kind]:
    """A text that is not a valid steer, as a field and as an argument."""
    for text in WRONG_TEXTS:
        yield Kind(f"text/{text!r}/field", REFUSED, dump({**BASE, "steer": text}))
        body = {**BASE, "vllm_xargs": {"steer": text}, "stream": True}
        yield Kind(f"text/{text!r}/argument", REFUSED, dump(body))


OPTIONS = ("strength", "layers", "phase", "schedule", "max", "top_p", "kl", "strenght", "")
WRONG_OPTIONS = (
    "[]", "{}", "[[1]]", "true", '"x"', '"1_0"', "NaN", "Infinity", str(10**400), "1e999",
    '{"a": 1}', '"\\ud800"', '"\\u0661"', "[null]",
)  # fmt: skip


def wrong_options() -> Iterator[Kind]:
    """Every option of a steer with invalid values."""
    for option in OPTIONS:
        for literal in WRONG_OPTIONS:
            body = with_literal(f'{{"v": {{"{option}": {literal}}}}}')
            yield Kind(f"option/{option}={literal[:12]}", REFUSED, body)


def above_ceilings() -> Iterator[Kind]:
    """Too long, too many parts, too deep; sizes up to 9 MB."""
    texts = {
        "16001-characters": "a:1" + "0" * 15_998,
        "16001-wide-characters": "\U0001f600" * 16_001,
        "65-parts": ",".join(["a:0"] * 65),
        "60000-parts": ",".join(["a"] * 60_000),
        "9-MB": "a:0.00001," * 900_000,
        "9-MB-of-one-name": "a" * 9_000_000,
        "9-MB-number": "a:" + "9" * 9_000_000,
        "json-of-65-keys": json.dumps(dict.fromkeys(map(str, range(65)), 1)),
        "json-depth": '{"a":' * 1000 + "1" + "}" * 1000,
    }
    for name, text in texts.items():
        yield Kind(f"ceiling/{name}/field", REFUSED, dump({**BASE, "steer": text}))
        body = dump({**BASE, "vllm_xargs": {"steer": text}})
        yield Kind(f"ceiling/{name}/argument", REFUSED, body)
    objects = {
        "65-keys": json.dumps(dict.fromkeys(map(str, range(65)), 1)),
        "200000-keys": json.dumps(dict.fromkeys(map(str, range(200_000)), 1)),
        "17-options": json.dumps({"v": dict.fromkeys(map(str, range(17)), 1)}),
        "depth-5": '{"v": {"layers": [[[[1]]]]}}',
        "depth-500": '{"v":' * 500 + "1" + "}" * 500,
        "long-key": json.dumps({"v" * 20_000: 1}),
        "4-MB-list": json.dumps({"v": {"layers": [1] * 1_500_000}}),
    }
    for name, literal in objects.items():
        for place in ("steer", "vllm_xargs"):
            yield Kind(f"ceiling/{name}/{place}", REFUSED, with_literal(literal, place))


def near_misses() -> Iterator[Kind]:
    """Misspelt names of our fields."""
    names = ("steers", "Steer", "STEER", "Steers", "steering", "steer_config", "steer_strength")
    for name in names:
        for value in ("a:1", {"a": 1}, True):
            yield Kind(f"near/{name}={value}", REFUSED, dump({**BASE, name: value}))
    for name in ("steers", "Steer", "STEER"):
        for path, body in BODIES.items():
            nearly = {**body, "vllm_xargs": {name: "a:1"}}
            yield Kind(f"near/vllm_xargs.{name}{path}", REFUSED, dump(nearly), path)
    for holder in ("extra_body", "extra_args", "sampling_params"):
        for inner in ({"steer": "a:1"}, {"Steer": "a"}, {"vllm_xargs": {"steer": "a"}}):
            yield Kind(f"near/{holder}={inner}", REFUSED, dump({**BASE, holder: inner}))
        for other in ({"steerage": 1}, "steer", ["steer"], {"x": {"steer": 1}}, None):
            yield Kind(f"near/{holder}={other}", SAME, dump({**BASE, holder: other}))


def unlike_strengths() -> Iterator[Kind]:
    """``steer_strengths`` that is not a boolean or is given twice, and beam search."""
    for literal in (
        '"yes"',
        "2",
        "[true]",
        '{"a": true}',
        "NaN",
        str(10**400),
        '"' + "t" * 5000 + '"',
    ):
        body = dump(BASE)[:-1] + f', "steer_strengths": {literal}}}'.encode()
        yield Kind(f"strengths/{literal[:12]}", REFUSED, body)
    twice = {"steer": "a:1", "vllm_xargs": {"steer": "a:1"}}
    yield Kind("twice/steer", REFUSED, dump({**BASE, **twice}))
    yield Kind("twice/strengths", REFUSED, dump(
        {**BASE, "steer_strengths": True, "vllm_xargs": {"steer_strengths": 1}}))  # fmt: skip
    for value in ("a:3", 5, [1], True, 1.5):
        yield Kind(f"xargs/{value}", REFUSED, dump({**BASE, "steer": "a:1", "vllm_xargs": value}))
    for stream in (False, True):
        for beams in (True, 1, "true", "on"):
            body = {**BASE, "n": 2, "use_beam_search": beams, "steer": "a:1", "stream": stream}
            yield Kind(f"beams/{beams}/stream={stream}", REFUSED, dump(body))
    for value in (1, {}, "x", [1], True):
        body = {**BASE, "vllm_xargs": {"vllm_steer_stream": value}, "stream": True}
        yield Kind(f"stream-of-ours/{value}", REFUSED, dump(body))


def spellings() -> Iterator[Kind]:
    """Encodings, escapes and repeated keys: served if the steer can be, refused if not."""
    for steer, due in (("a:1", SERVED), ("b:1", SERVED), ("happy", REFUSED), (5, REFUSED)):
        body = {**BASE, "steer": steer}
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            text = json.dumps(body).encode(encoding)
            yield Kind(f"encoding/{encoding}/{steer}", due, text)
        plain = dump(body)
        forms = {
            "escaped-key": plain.replace(b'"steer"', b'"\\u0073t\\u0065er"'),
            "twice": plain.replace(b'"steer"', b'"steer": "happy", "steer"'),
            "indented": json.dumps(body, indent=4).encode(),
            "spaced": b" \r\n\t" + plain.replace(b":", b" : ") + b"\n\n ",
            "with-nan": plain[:-1] + b', "x": NaN}',
            "with-surrogate": plain[:-1] + b', "x": "\\ud800"}',
            "with-401-digits": plain[:-1] + b', "x": ' + str(10**400).encode() + b"}",
            "with-9-MB": plain[:-1] + b', "x": "' + b"y" * 9_000_000 + b'"}',
        }
        for name, text in forms.items():
            yield Kind(f"spelling/{name}/{steer}", due, text)
    for steer in ("", "none", {}, "{}", "a:0", None, " none "):
        yield Kind(f"no-steer/{steer!r}", SERVED, dump({**BASE, "steer": steer}))
    yield Kind("spelling/64-parts", SERVED, dump({**BASE, "steer": ",".join(["a:0.01"] * 64)}))
    yield Kind("spelling/16000", SERVED, dump({**BASE, "steer": "a:1" + " " * 15_997}))
    for path, body in BODIES.items():
        yield Kind(f"served{path}", SERVED, dump({**body, "steer": {"a": 1}}), path)


def other_routes() -> Iterator[Kind]:
    """Routes that the plugin does not handle, and those that would ignore a steer."""
    for path in (
        "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/embeddings", "/score",
        "/rerank", "/pooling", "/classify", "/v1/load_lora_adapter", "/unknown", "/", "/v1",
        "/v1/completions/", "//v1/completions", "/v1/completions/derender", "/V1/completions",
    ):  # fmt: skip
        for steer in ("a:1", 5):
            body = {**BASE, "messages": CONVERSATION, "steer": steer}
            yield Kind(f"route{path}/{steer}", SAME, dump(body), path)
    for path in ("/inference/v1/generate", "/generative_scoring"):  # the first lacks its parameters
        for fields in (
            {"steer": "a:1"},
            {"vllm_xargs": {"steer": "a"}},
            {"model": "base:friendly"},
        ):
            yield Kind(f"route{path}/{fields}", REFUSED, dump({**BASE, **fields}), path)
    for model in ("other", "base:frindly", "base:", ":friendly", "friendly", 5, None, ["base"]):
        yield Kind(f"model/{model}", SAME, dump({**BASE, "model": model}))


def other_requests() -> Iterator[Kind]:
    """Methods and content types under which no body is rewritten."""
    body = dump({**BASE, "steer": 5})
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "STEER"):
        yield Kind(f"method/{method}", SAME, body, method=method)
    for content_type in (
        None, "", "text/plain", "text/json", "multipart/form-data", "application/jsonl", "x",
        "application/x-www-form-urlencoded", "application/json ;charset=utf-8",
        "application/vnd.api+json", "application/octet-stream", ";application/json",
    ):  # fmt: skip
        for path in (COMPLETIONS, CHAT):
            name = f"content-type/{content_type}{path}"
            yield Kind(name, SAME, body, path, content_type=content_type)
    for content_type in ("Application/JSON", "application/json;charset=utf-8", "application/json;"):
        yield Kind(f"content-type/{content_type}", REFUSED, body, content_type=content_type)


def without_key() -> Iterator[Kind]:
    """Without the API key every body gets the same answer; ``/invocations`` needs no key."""
    all_kinds = (*wrong_types(), *above_ceilings(), *spellings(), *near_misses())
    bodies = [kind for kind in all_kinds if kind.path != "/invocations"]
    for key in (None, "wrong", ""):
        for kind in bodies[::5]:
            yield replace(kind, name=f"key={key}/{kind.name}", due=DENIED, key=key)


def malformed() -> Iterator[Kind]:
    """Bodies that are no JSON, or no object."""
    texts = (
        b"", b" ", b"{", b"}", b"[]", b"null", b"5", b'"steer"', b'["steer"]', b'{"steer"',
        b'{"steer": ', b'{"steer": "a"', b'{"steer": "a",}', b'{"steer": "a"} x', b"{'steer': 'a'}",
        b'{"steer": a}', b'{"steer": "\xff"}', b"\xff\xfe", b"\0" * 1000, b"steer", b"\xef\xbb\xbf",
        b'{"steer": "a\nb"}', b'{"steer": "\\x"}', b'{"steer": 01}', b'{"steer": .5}', b"[" * 9000,
        b'{"x":' * 9000, b'{"steer":"a","x":' + b"[" * 9000 + b"]" * 9000 + b"}", b"<xml/>",
        dump({**BASE, "prompt": "steer"})[:-3], json.dumps({"steer": "a"}).encode("utf-16")[:-1],
        b'{"steer": "a"}' * 2, b"{" + b'"steer": "a",' * 1000, b'{"model": "\xff:friendly"}',
    )  # fmt: skip
    for at, text in enumerate(texts):
        for path in (COMPLETIONS, MESSAGES):
            yield Kind(f"malformed/{at}{path}", SAME, text, path)


def wrong_fields() -> Iterator[Kind]:
    """vLLM's own fields with wrong values, next to words that resemble our fields."""
    values = ("steer", -1, 1e400, [], {}, {"steer": 1}, True, "base:friendly", 2**70, None)
    for field in ("prompt", "max_tokens", "temperature", "stop", "n", "seed", "vllm_xargs"):
        for value in values:
            if field == "vllm_xargs" and isinstance(value, dict) and value:
                continue
            yield Kind(f"field/{field}={value}", SAME, dump({**BASE, field: value}))


LETTERS = 'xyz01_-. :,{}[]"\\\u00e9\u4e2d\u202e\x07\ud800'


def random_value(generator: random.Random, depth: int = 0) -> Any:
    """A JSON value without the name of a steer."""
    choice = generator.randrange(8 if depth < 3 else 5)
    if choice == 0:
        return generator.choice([None, True, False])
    if choice == 1:
        return generator.randrange(-(10**20), 10**20)
    if choice == 2:
        return generator.choice([generator.gauss(0, 1e3), float("nan"), float("inf"), -0.0])
    if choice < 5:
        return random_text(generator)
    if choice == 5:
        return [random_value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return {
        random_text(generator): random_value(generator, depth + 1)
        for _ in range(generator.randrange(4))
    }


def random_text(generator: random.Random) -> str:
    return "x" + "".join(generator.choices(LETTERS, k=generator.randrange(12)))


def random_steers(generator: random.Random, count: int) -> Iterator[Kind]:
    """Values that name no steer, in either place, on any route."""
    for at in range(count):
        value = random_value(generator)
        while value is None or value == {}:
            value = random_value(generator)
        path = generator.choice(list(BODIES))
        body = dict(BODIES[path])
        body |= {"steer": value} if at % 2 else {"vllm_xargs": {"x": "1", "steer": value}}
        yield Kind(f"random-steer/{at}", REFUSED, dump(body), path)


def random_bodies(generator: random.Random, count: int) -> Iterator[Kind]:
    """Bodies with random values of vLLM's fields, and without our fields."""
    fields = ("prompt", "max_tokens", "temperature", "top_p", "seed", "stream", "user", "stop", "x")
    for at in range(count):
        body = dict(BASE)
        for field in generator.sample(fields, 2):
            body[field] = random_value(generator)
        body["note"] = generator.choice(["steer", "Steer me", "\\u0073teer", "base:friendly"])
        yield Kind(f"random-body/{at}", SAME, dump(body))
