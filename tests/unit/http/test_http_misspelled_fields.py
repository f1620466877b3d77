"""Misspelt names of our fields, and requests without them."""

import json
from typing import Any

import pytest
from http_tools import send_chunks

NEAR = [
    ({"steers": "a:3"}, "steers", '"steer": "detox:5,humor"'),
    ({"Steer": {"a": 3}}, "Steer", '"steer":'),
    ({"STEER": "a"}, "STEER", '"steer":'),
    ({"steering": "a"}, "steering", '"steer":'),
    ({"steer_config": {}}, "steer_config", '"steer":'),
    ({"steer_strength": True}, "steer_strength", '"steer_strengths": true'),
    ({"steer": "a:3", "steers": "b"}, "steers", '"steer":'),
    ({"extra_body": {"steer": "a"}}, "extra_body.steer", '"steer":'),
    ({"extra_body": {"steer_strengths": True}}, "extra_body.steer_strengths", "_strengths"),
    ({"extra_body": {"vllm_xargs": {"steer": "a"}}}, "extra_body.vllm_xargs.steer", "vllm_xargs"),
    ({"extra_args": {"steer": "a"}}, "extra_args.steer", "vllm_xargs"),
    ({"extra_args": {"Steer": "a"}}, "extra_args.Steer", "vllm_xargs"),
    ({"vllm_xargs": {"steers": "a"}}, "vllm_xargs.steers", '"steer":'),
    ({"vllm_xargs": {"Steer": "a"}}, "vllm_xargs.Steer", '"steer":'),
    ({"sampling_params": {"steer": "a"}}, "sampling_params.steer", '"steer":'),
    (
        {"sampling_params": {"extra_args": {"steer": "a"}}},
        "sampling_params.extra_args.steer",
        '"steer":',
    ),
]


@pytest.mark.parametrize(("body", "location", "example"), NEAR, ids=lambda value: str(value)[:50])
def test_a_misspelt_field_is_answered_with_the_right_name(
    body: Any, location: str, example: str
) -> None:
    status, _, _, message = send_chunks([json.dumps({"prompt": "x", **body}).encode()])
    assert status == 400
    error = json.loads(message)["error"]
    assert error["param"] == location
    assert error["message"].startswith(f"{location} is not a field of this server")
    assert example in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"steers": None, "Steer": None},
        {"steerable": 1, "steer-config": 2, "my_steer": 3, "steers_": 4, "sTEER": 5},
        {"extra_body": {"other": "steer"}},
        {"extra_body": "steer"},
        {"extra_body": ["steer"]},
        {"extra_args": {"mine": {"steer": 1}}},
        {"sampling_params": {"temperature": 0, "stop": "steer"}},
        {"metadata": {"steer": "a", "steers": "b"}},
        {"vllm_xargs": {"steering": "left", "steer_config": "x"}},
        {"messages": [{"role": "user", "content": "steer", "steer": "a:3"}]},
        {"tools": [{"type": "function", "function": {"name": "steer", "steering": {}}}]},
    ],
    ids=str,
)
def test_unrelated_fields_pass_byte_for_byte(body: Any) -> None:
    text = json.dumps({"prompt": "x", **body}).encode()
    status, passed, _, _ = send_chunks([text])
    assert status == 200
    assert passed.chunks == [text]


def test_the_token_route_keeps_extra_args_which_it_reads() -> None:
    body = json.dumps({"sampling_params": {"extra_args": {"steer": "a:3"}}}).encode()
    status, passed, _, _ = send_chunks([body], path="/inference/v1/generate")
    assert status == 200
    assert passed.chunks == [body]
    body = json.dumps({"sampling_params": {"steer": "a:3"}}).encode()
    assert send_chunks([body], path="/inference/v1/generate")[0] == 400


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ({"steer": "gone:3"}, "steer", "steer 'gone' is unknown"),
        ({"steer": 5}, "steer", "steer is 5; allowed: a string"),
        ({"steer_strengths": "maybe"}, "steer_strengths", "expected true or false"),
        ({"steers": "a:3"}, "steers", "use steer, in the body itself"),
        ({"Steer": "a:3"}, "Steer", "is not a field of this server"),
    ],
)
def test_the_token_routes_arguments_are_checked_before_a_stream_begins(
    arguments: Any, param: str, message: str
) -> None:
    body = json.dumps({"stream": True, "sampling_params": {"extra_args": arguments}}).encode()
    status, _, _, answer = send_chunks([body], path="/inference/v1/generate")
    assert status == 400
    error = json.loads(answer)["error"]
    assert error["param"] == f"sampling_params.extra_args.{param}"
    assert message in error["message"]


TWICE = '"steer": {"a": {"strength": 1, "strength": 2}}'


@pytest.mark.parametrize(
    "body",
    [
        "{" + TWICE + "}",
        "{" + TWICE + ', "temperature": NaN}',
        '{"vllm_xargs": {' + TWICE + '}, "temperature": NaN}',
    ],
    ids=["strict", "nan", "nan-in-arguments"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_duplicate_key_of_a_steer_is_refused_in_every_encoding(body: str, encoding: str) -> None:
    status, _, _, message = send_chunks([body.encode(encoding)])
    assert status == 400
    assert "given twice" in json.loads(message)["error"]["message"]


def test_a_preset_after_a_long_model_name_is_found() -> None:
    for base in ("m" * 2000, "\u6f22" * 300):
        body = json.dumps({"prompt": "x", "model": f"{base}:friendly"}).encode()
        status, passed, _, _ = send_chunks([body])
        assert status == 200
        assert json.loads(b"".join(passed.chunks))["vllm_xargs"] == {"steer": "friendly"}
