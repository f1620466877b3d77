"""Requests that a served model refuses; the server goes on after each of them."""

import json
import re
import socket
from typing import Any

import httpx
import pytest
from asking import BASE, PROMPT

KNOWN = r"steers: a, b, c, d, v; presets: friendly, mix"
BAD: dict[str, tuple[Any, str]] = {
    "unknown-name": ("happy:1", rf"steer 'happy' is unknown; {KNOWN}"),
    "unknown-name-in-a-dict": ({"happy": 1}, rf"steer 'happy' is unknown; {KNOWN}"),
    "bad-number": ("a:five", r"steer a has strength 'five'; expected a number, such as a:1\.5"),
    "nan": ("a:nan", r"steer a has strength 'nan'; expected a number"),
    "infinity": ("a:-inf", r"steer a has strength '-inf'; expected a number"),
    "too-large-a-literal": ("a:1e999", r"steer a has strength '1e999'; it must be finite"),
    "too-many": ("a:1,b:1,c:1", r"3 steers are asked for; at most 2 are allowed per request"),
    "above-the-limit": ("a:10.5", r"steer a has strength 10\.5; allowed: -10 to 10"),
    "below-the-limit": ("a:-11", r"steer a has strength -11; allowed: -10 to 10"),
    "preset-above-the-limit": ("friendly:4", r"steer a has strength 12; allowed: -10 to 10"),
    "half-a-part": ("a:", r"incomplete part 'a:'; allowed: a string such as 'detox:5,humor'"),
    "half-a-json": ('{"a": 3', r"is not JSON"),
    "number": (5, r"steer is 5; allowed: a string such as 'detox:5,humor'"),
    "list": (["a", 3], r"steer is \['a', 3\]; allowed: a string such as"),
    "list-of-dicts": ([{"a": 3}], r"steer.*allowed: a string such as"),
    "list-of-nothing": ([None], r"steer.*allowed: a string such as"),
    "true": (True, r"(?i)steer.*true"),
    "null-strength": ({"a": None}, r"steer a has strength None; expected a number"),
    "unknown-option": ({"a": {"strenght": 3}}, r"steer a has unknown options strenght; allowed"),
    "layers-at-the-head": ({"a": {"layers": "1-2"}}, r"steer a acts at the LM head"),
    "layers-it-lacks": ({"v": {"layers": "1-3"}}, r"steer v: layers 3 are not in this steer"),
    "malformed-layers": ({"v": {"layers": "deep"}}, r"steer v: layers is 'deep'; expected 0-based"),
    "unknown-phase": ({"v": {"phase": "end"}}, r"phase 'end'; allowed: all, prompt, generation"),
    "schedule-of-a-vector": ({"v": {"schedule": "dim"}}, r"only a delta steer has a schedule"),
    "unknown-schedule": ({"d": {"schedule": "log"}}, r"schedule 'log'; allowed: fixed, start, dim"),
    "huge-integer": ({"a": 10**400}, r"strength a whole number of 401 digits; expected a number"),
}


def assert_refusal(reply: httpx.Response, message: str, param: str = "steer") -> None:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "BadRequestError", error
    assert error["param"] == param, error
    assert error["code"] == 400
    assert re.search(message, error["message"]), error


def assert_alive(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 2})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_bad_steer_field_is_a_bad_request_and_the_server_goes_on(
    http: httpx.Client, case: str, stream: bool
) -> None:
    steer, message = BAD[case]
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 2, "stream": stream, "steer": steer}
    if stream:
        body["stream_options"] = {"include_usage": True}
    assert_refusal(http.post("/v1/completions", json=body), message)
    assert_alive(http)


@pytest.mark.parametrize(
    "case", [case for case, (steer, _) in BAD.items() if type(steer) in (str, int)]
)
def test_a_bad_steer_argument_is_a_bad_request(http: httpx.Client, case: str) -> None:
    steer, message = BAD[case]
    body = {
        "model": BASE,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 2,
        "vllm_xargs": {"steer": steer},
    }
    assert_refusal(http.post("/v1/chat/completions", json=body), message, "vllm_xargs.steer")


def test_arguments_that_name_no_steer_are_a_bad_request(http: httpx.Client) -> None:
    for steer in ([{"a": 3}], None):
        body = {"model": BASE, "prompt": "a", "max_tokens": 2, "vllm_xargs": {"steer": steer}}
        assert http.post("/v1/completions", json=body).status_code == 400
    assert_alive(http)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", '{"a": NaN}', "1e999"])
@pytest.mark.parametrize("place", ['"steer": %s', '"vllm_xargs": {"steer": %s}'])
def test_numbers_that_json_does_not_have_are_a_bad_request(
    http: httpx.Client, literal: str, place: str
) -> None:
    fields = f'"model": "{BASE}", "prompt": "a", "max_tokens": 2, {place % literal}'
    reply = http.post(
        "/v1/completions",
        content="{" + fields + "}",
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400, reply.text
    assert_alive(http)


@pytest.mark.parametrize("xargs", ["a:3", 5, [1], True], ids=repr)
def test_a_steer_field_beside_malformed_arguments_is_a_bad_request(
    http: httpx.Client, xargs: Any
) -> None:
    body = {"model": BASE, "prompt": "a", "max_tokens": 2, "steer": "a:1", "vllm_xargs": xargs}
    assert http.post("/v1/completions", json=body).status_code == 400
    assert_alive(http)


def test_a_very_deep_body_is_a_bad_request(http: httpx.Client) -> None:
    steer = '{"a":' * 50_000 + "1" + "}" * 50_000
    for value in (steer, json.dumps(steer)):
        reply = http.post(
            "/v1/completions",
            content=f'{{"model": "{BASE}", "prompt": "a", "max_tokens": 2, "steer": {value}}}',
            headers={"content-type": "application/json"},
        )
        assert reply.status_code == 400, reply.text[:300]
    assert_alive(http)


def test_a_steer_given_twice_is_a_bad_request(http: httpx.Client) -> None:
    body = {
        "model": BASE,
        "prompt": PROMPT,
        "steer": "a:1",
        "vllm_xargs": {"steer": "a:1"},
    }
    reply = http.post("/v1/completions", json=body)
    assert_refusal(reply, "both as a field and in vllm_xargs; give it once")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": PROMPT}),
        ("/tokenize", {"prompt": PROMPT}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": PROMPT}]}),
    ],
    ids=["embeddings", "tokenize", "count_tokens"],
)
def test_a_route_that_generates_nothing_answers_as_vllm(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    plain, steered = (http.post(path, json={"model": BASE, **body, **steer}) for steer in
                     ({}, {"steer": "a:3"}))  # fmt: skip
    assert steered.status_code == plain.status_code


def test_the_token_route_names_the_field_at_fault(http: httpx.Client) -> None:
    body = {"model": BASE, "token_ids": [1, 5], "sampling_params": {"max_tokens": 2}}
    reply = http.post("/inference/v1/generate", json={**body, "steer": "happy:3"})
    assert_refusal(reply, "steer 'happy' is unknown")
    extra_args = {"steer": {"d": {"strength": "dynamic", "max": 2}}}  # refused by admission
    params = {"max_tokens": 2, "prompt_logprobs": 1, "extra_args": extra_args}
    reply = http.post("/inference/v1/generate", json={**body, "sampling_params": params})
    assert_refusal(reply, "prompt_logprobs", "sampling_params.extra_args.steer")


def test_a_route_that_generates_nothing_still_serves(http: httpx.Client) -> None:
    for model in (BASE, f"{BASE}:friendly"):
        reply = http.post("/tokenize", json={"model": model, "prompt": PROMPT})
        assert reply.status_code == 200, reply.text
        assert reply.json()["count"] > 0


@pytest.mark.parametrize("body", [b'{"steer": ', b"", b"[]", b'["steer"]', b"\xff\xfe", b'"steer"'])
def test_a_malformed_body_gets_vllms_own_answer(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answers = [
        http.post("/v1/completions", content=content, headers=headers)
        for content in (body, body.replace(b"steer", b"steel"))
    ]
    assert {reply.status_code for reply in answers} == {400}
    assert answers[0].json()["error"]["type"] == answers[1].json()["error"]["type"]
    assert answers[0].json()["error"]["param"] not in ("steer", "vllm_xargs.steer")
    assert_alive(http)


@pytest.mark.parametrize("place", ["body", "arguments"])
def test_beam_search_which_would_drop_the_steer_is_a_bad_request(
    http: httpx.Client, place: str
) -> None:
    fields = {"steer": "a:1"} if place == "body" else {"vllm_xargs": {"steer": "a:1"}}
    body = {"model": BASE, "prompt": "a", "max_tokens": 2, "n": 2, "use_beam_search": True}
    reply = http.post("/v1/completions", json=body | fields)
    param = "steer" if place == "body" else "vllm_xargs.steer"
    assert_refusal(reply, "beam search does not support steering", param)
    assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("model", ["other", "other:friendly", f"{BASE}:happy", ":friendly"])
def test_an_unknown_model_is_still_not_found(http: httpx.Client, model: str) -> None:
    reply = http.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 2})
    assert reply.status_code == 404, reply.text


def test_a_client_that_leaves_in_mid_stream_leaves_the_server_alive(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
    for steer in ("a:3", "c:2", "none"):
        fields = {**body, "stream": True, "steer": steer}
        with http.stream("POST", "/v1/completions", json=fields) as reply:
            assert reply.status_code == 200
            next(reply.iter_lines())
    assert_alive(http)


def test_a_client_that_leaves_in_mid_body_leaves_the_server_alive(
    server: Any, http: httpx.Client
) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 500\r\n\r\n{"model": "base", "steer": '
        )
    assert_alive(http)


def test_the_server_is_healthy_after_all_of_this(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
