"""Bodies of any kind: parsed like ``json.loads``, passed on in their original chunks."""

import asyncio
import json
from typing import Any

import pytest
from http_tools import PLAN, post, send_chunks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_steer.serving.http.body_rewrite import preset_of
from vllm_steer.serving.http.misspelled_fields import BODY_MISSPELLINGS, CLIENT_ONLY_FIELDS
from vllm_steer.serving.http.request_body import ReceivedBody, SteerHints


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()


ASKING = dump({"prompt": "x", "steer": "a:3"})


@pytest.mark.parametrize(
    "options",
    [
        *({"path": path} for path in (
            "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/embeddings", "/score",
            "/v1/score", "/rerank", "/v2/rerank", "/pooling", "/classify", "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter", "/v1/models", "/unknown", "/", "", "/xv1completions",
            "/v1/completions/", "/v1/completions/derender", "/v1/responses/id/cancel", "/v2/embed",
            "/v1/audio/transcriptions", "/reset_prefix_cache", "/v1/chat/completion", "/messages",
        )),
        *({"method": method} for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")),
        *({"content_type": kind} for kind in (
            None, b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data",
            b"application/jsonl", b"application/json x", b"application/vnd.api+json", b"json",
            b"application/json ;charset=utf-8", b"\xff",
        )),
    ],
    ids=str,
)  # fmt: skip
def test_bodies_that_are_never_rewritten_are_not_read(options: dict[str, Any]) -> None:
    status, passed, received, _ = send_chunks([ASKING[:9], ASKING[9:]], **options)
    assert (status, received) == (200, 0)
    assert passed.chunks == [ASKING[:9], ASKING[9:]]


@pytest.mark.parametrize("kind", [b"Application/JSON", b"application/json;charset=utf-8"])
def test_every_content_type_that_vllm_reads_as_json_is_read(kind: bytes) -> None:
    """vLLM's own check decides, so that none is served unsteered."""
    from fastapi.exceptions import RequestValidationError
    from starlette.requests import Request
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    def is_json_type(content_type: bytes) -> bool:
        scope = {"type": "http", "headers": [(b"content-type", content_type)]}
        try:
            asyncio.run(validate_json_request(Request(scope)))
        except RequestValidationError:
            return False
        return True

    assert is_json_type(kind)
    assert not is_json_type(b"application/json ;charset=utf-8")
    _, passed, received, _ = send_chunks([ASKING], content_type=kind)
    assert received == 1
    assert json.loads(b"".join(passed.chunks))["vllm_xargs"] == {"steer": "a:3"}


def test_a_body_without_a_steer_passes_in_the_same_chunks() -> None:
    chunks = [bytes([65 + at % 26]) * 1000 for at in range(50)]
    _, passed, received, _ = send_chunks(chunks)
    assert received == len(chunks)
    assert all(a is b for a, b in zip(passed.chunks, chunks, strict=True))
    assert passed.last["type"] == "http.request"


def test_a_rewritten_body_keeps_its_chunks_but_the_last() -> None:
    chunks = [b'{"steer": "a:3", "prompt": "', b"x" * 1000, b'"', b"} ", b"\n"]
    _, passed, _, _ = send_chunks(chunks)
    assert all(a is b for a, b in zip(passed.chunks[:3], chunks[:3], strict=True))
    assert json.loads(b"".join(passed.chunks))["vllm_xargs"] == {"steer": "a:3"}
    assert dict(passed.headers)[b"content-length"] == b"%d" % len(b"".join(passed.chunks))


@pytest.mark.parametrize("body", [ASKING, b'{"prompt": "x', b""])
def test_a_truncated_body_passes_with_its_end(body: bytes) -> None:
    status, passed, _, _ = send_chunks([body], cut=True)
    assert status == 200
    assert b"".join(passed.chunks) == body
    assert passed.last == {"type": "http.disconnect"}


def test_chunks_are_freed_as_they_are_read() -> None:
    body = ReceivedBody(SteerHints())

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x", "more_body": body.length < 9}

    async def take_all() -> list[int]:
        await body.receive(receive)
        replay = body.replay(receive)
        remaining = []
        while (await replay())["more_body"]:
            remaining.append(len(body._chunks))
        return remaining

    assert asyncio.run(take_all()) == [*range(9, 0, -1)]


HINTING = [
    dump({"steer": "a"}),
    b'{"\\u0073teer": "a"}',
    b'{"st\\u0065\\u0065r": "a"}',
    b'{"STEER": "a"}',
    dump({"model": "base:friendly"}),
    b'{"model": "base\\u003afriendly"}',
    b'{"model": "base:friendl\\u0079"}',
    json.dumps({"steer": "a"}).encode("utf-16"),
    json.dumps({"steer": "a"}).encode("utf-32-be"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("body", HINTING, ids=repr)
def test_hints_are_found_across_chunks_of_any_size(body: bytes, size: int) -> None:
    whole = b'{"x": "' + b"y" * 50 + b'", ' + body[1:] if body.startswith(b"{") else body
    chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
    received = ReceivedBody(SteerHints(PLAN.presets))

    async def receive() -> Any:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    assert asyncio.run(received.receive(receive))
    assert received.may_mention_steer


def test_ordinary_escapes_are_no_hints() -> None:
    body = dump({"prompt": 'völlig "normal" \u4e2d\u6587 \x00 \x1f é', "model": "base:other"})
    assert not SteerHints(PLAN.presets).are_in(body)


SPELLINGS = [
    (rb'{"\u0073teer":"a:3"}', "a:3"),
    (rb'{"steer":"b","steer":"a:3"}', "a:3"),
    (rb'{"steer":"a","steer":null}', None),
    (b'{"x":NaN,"steer":"a:3"}', "a:3"),
    (b'{"x":-Infinity,"steer":"a:3"}', "a:3"),
    (b'\xef\xbb\xbf{"steer":"a:3"}', "a:3"),
    (rb'{"x":"\ud800","steer":"a:3"}', "a:3"),
    (b'{"x":"\xed\xa0\x80","steer":"a:3"}', "a:3"),
    (b'{"x":1e999,"steer":"\\u0061:3"}', "a:3"),
    (b'{"x":' + b"9" * 4000 + b',"steer":"a:3"}', "a:3"),
    (b' \t\r\n{"steer" : "a:3" } \n', "a:3"),
    (json.dumps({"steer": "a:3"}).encode("utf-16"), "a:3"),
    (json.dumps({"steer": "a:3"}).encode("utf-16-be"), "a:3"),
    (json.dumps({"steer": "a:3", "x": "\ud800"}).encode("utf-32"), "a:3"),
    (b'{"vllm_xargs":{"steer":{"a":3}},"x":NaN}', '{"a": 3}'),
    (b'{"vllm_xargs":{"steer":"b"},"vllm_xargs":{"steer":{"a":3}}}', '{"a":3}'),
    (b'{"vllm_xargs":{"steer":{"a":1},"steer":{"a":3}}}', '{"a":3}'),
]


@pytest.mark.parametrize(("body", "steer"), SPELLINGS, ids=lambda value: repr(value)[:50])
def test_every_json_spelling_is_served_as_json_reads_it(body: bytes, steer: str | None) -> None:
    before = json.loads(body)
    status, passed = post(body)
    assert status == 200
    after = json.loads(passed)
    assert (after.get("vllm_xargs") or {}).get("steer") == steer
    assert repr(after.get("x")) == repr(before.get("x"))


@pytest.mark.parametrize(
    "body",
    [
        b'{"steer": ', b"", b"[]", b'["steer"]', b'"steer"', b"\xff\xfe", b'{"steer":"\xff"}',
        b'{"model":"\xff:friendly"}', b'{"steer":1,}', b'{"steer":"a"} x', b"\0" * 1000,
        b'{"vllm_xargs":"steer"}', b'{"vllm_xargs":["steer"]}', b'{"steer":"a\nb"}',
        b'{"x":' + b"[" * 5000 + b"]" * 5000 + b',"steer":"a"}', b"steer", b"nullsteer",
        b'{"prompt":"steer","model":5}', b'{"steer":null,"steers":null}',
    ],
    ids=lambda body: repr(body)[:40],
)  # fmt: skip
def test_bodies_left_to_vllm_pass_byte_for_byte(body: bytes) -> None:
    assert post(body) == (200, body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
steer_values = st.one_of(
    json_values,
    st.sampled_from(
        ["a:3", "a", "none", "", "friendly", "a:1,b:2", "a:1_0", "a:\u0661", "a:nan", "c"]
    ),
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([1, 2.5, "3", "x", None])),
)
keys = st.sampled_from(
    ["steer", "steer_strengths", "vllm_xargs", "model", "prompt", "stream", "use_beam_search",
     "x", *BODY_MISSPELLINGS, *CLIENT_ONLY_FIELDS]
)  # fmt: skip
bodies = st.dictionaries(
    keys,
    steer_values
    | st.booleans()
    | st.sampled_from(["base", "base:friendly"])
    | st.dictionaries(st.sampled_from(["steer", "steers", "steer_strengths", "x"]), steer_values),
)
layouts = st.sampled_from(
    [
        {},
        {"ensure_ascii": False},
        {"indent": 2},
        {"separators": (",", ":")},
    ]
)


def expected(body: dict[str, Any]) -> dict[str, Any] | None:
    """The expected body in plain ``json``; None if a 400 is expected."""
    nested = body.get("vllm_xargs")
    inside = nested if isinstance(nested, dict) else {}
    arguments = {k: inside[k] for k in ("steer", "steer_strengths") if inside.get(k) is not None}
    fields = {k: body[k] for k in ("steer", "steer_strengths") if body.get(k) is not None}
    merged = {**arguments, **fields}
    preset = preset_of(body.get("model"), PLAN)
    if preset is not None:
        merged.setdefault("steer", preset)
    if not merged:
        return body
    if any(k in inside for k in fields) or not (nested is None or isinstance(nested, dict)):
        return None
    if "steer" in merged:
        steer = merged["steer"]
        if not isinstance(steer, str | dict):
            return None
        try:
            doses = PLAN.doses(steer if isinstance(steer, str) else json.dumps(steer))
        except ValueError:
            return None
        if doses and body.get("use_beam_search") in (True, 1):
            return None
    wish = merged.get("steer_strengths", False)
    if wish not in (True, False) and str(wish).strip().lower() not in ("true", "false", "0", "1"):
        return None
    return {**body, "vllm_xargs": {**inside, **merged}}


def normalised(value: Any) -> Any:
    """A normalised body: a steer's object and its JSON text, ``true`` and "true" are equal."""
    value = {k: v for k, v in value.items() if k not in ("steer", "steer_strengths")}
    inside = value.get("vllm_xargs")
    if isinstance(inside, dict):
        steer, wish = inside.get("steer"), inside.get("steer_strengths")
        if isinstance(steer, str) and steer.lstrip().startswith("{"):
            inside["steer"] = json.loads(steer)
        if isinstance(wish, bool):
            inside["steer_strengths"] = str(wish).lower()
    return json.dumps(value, sort_keys=True)


@given(body=bodies, layout=layouts, pad=st.sampled_from(["", " ", "\n\t"]))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_body_is_served_as_json_reads_it_or_gets_our_400(
    body: dict[str, Any], layout: dict[str, Any], pad: str
) -> None:
    text = (pad + json.dumps(body, **layout) + pad).encode("utf-8", "surrogatepass")
    status, passed, _, answer = send_chunks([text[:7], text[7:]])
    if status == 400:
        error = json.loads(answer)["error"]
        assert error["type"] == "BadRequestError"
        assert 0 < len(error["message"]) <= 1000
        inside = body.get("vllm_xargs")
        nearly = {*BODY_MISSPELLINGS, *CLIENT_ONLY_FIELDS} & {
            *body,
            *(inside if isinstance(inside, dict) else ()),
        }
        assert nearly or expected(json.loads(text)) is None
        return
    result, expected_body = json.loads(b"".join(passed.chunks)), expected(json.loads(text))
    assert expected_body is not None
    if expected_body == json.loads(text):
        assert b"".join(passed.chunks) == text or normalised(result) == normalised(expected_body)
    else:
        assert normalised(result) == normalised(expected_body)


@given(text=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-16")))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_passed_on_or_get_our_400(text: bytes) -> None:
    for body in (text, b'{"steer":' + text + b"}", b'{"steer":"' + text + b'"}'):
        status, passed = post(body)
        assert status in (200, 400)
        if status == 200 and json_or_none(body) is None:
            assert passed == body


def json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
