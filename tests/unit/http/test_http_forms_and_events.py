"""The audio routes: vLLM's own routers behind the middleware, with a stand-in for the model."""

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from http_tools import CONFIG
from starlette.testclient import TestClient

from vllm_steer.serving.http import SteerMiddleware
from vllm_steer.serving.http.forms import FormCheck

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
AUDIO = bytes(range(256)) * 4096  # one MiB, with line breaks and all that a boundary has


class Audio:
    """Records what vLLM's routes would transcribe."""

    def __init__(self) -> None:
        self.data = b""
        self.request: Any = None

    async def create_transcription(self, data: bytes, request: Any, raw_request: Any) -> Any:
        from vllm.entrypoints.speech_to_text.transcription.api_router import ErrorResponse

        self.data, self.request = data, request
        return ErrorResponse(error={"message": "reached", "type": "x", "code": 418})

    create_translation = create_transcription


class Realtime:
    """Knows every model."""

    def _is_model_supported(self, model: Any) -> bool:
        return True

    engine_client = None


@pytest.fixture
def audio() -> Audio:
    return Audio()


@pytest.fixture
def client(audio: Audio) -> Iterator[TestClient]:
    from vllm.entrypoints.speech_to_text.realtime import api_router as realtime
    from vllm.entrypoints.speech_to_text.transcription import api_router as transcription
    from vllm.entrypoints.speech_to_text.translation import api_router as translation

    app = FastAPI()
    for module in (realtime, transcription, translation):
        app.include_router(module.router)
    app.add_middleware(SteerMiddleware)
    app.state.vllm_config = CONFIG
    app.state.openai_serving_transcription = app.state.openai_serving_translation = audio
    app.state.openai_serving_realtime = Realtime()
    app.state.enable_server_load_tracking = False
    with TestClient(app) as client:
        yield client


def send(client: TestClient, path: str, **fields: str) -> Any:
    files = {"file": ("a.wav", AUDIO, "audio/wav")}
    return client.post(path, data={"model": "base", **fields}, files=files)


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
@pytest.mark.parametrize(
    "fields",
    [{}, {"prompt": "a steer: friendly"}, {"model": "base:other"}, {"language": "en"}],
    ids=str,
)
def test_an_ordinary_form_reaches_vllm_unchanged(
    client: TestClient, audio: Audio, path: str, fields: dict[str, str]
) -> None:
    assert send(client, path, **fields).status_code == 418
    assert audio.data == AUDIO
    for name, value in fields.items():
        assert getattr(audio.request, name) == value


def test_a_steer_in_the_arguments_reaches_vllm(client: TestClient, audio: Audio) -> None:
    reply = send(client, TRANSCRIPTIONS, vllm_xargs='{"steer": "a:2", "x": 1}')
    assert reply.status_code == 418
    assert audio.data == AUDIO
    assert audio.request.vllm_xargs == {"steer": "a:2", "x": 1}


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"steer": "a:3"}, "steer", 'vllm_xargs only, a form field .* {"steer": "detox:5,humor"}'),
        ({"steers": "a:3"}, "steers", "vllm_xargs only"),
        ({"model": "base:friendly"}, "model", 'send vllm_xargs, such as {"steer": "friendly"}'),
        ({"steer_strengths": "true"}, "steer_strengths", "does not report strengths"),
        ({"vllm_xargs": '{"steers": "a"}'}, "vllm_xargs.steers", "use steer"),
        ({"vllm_xargs": '{"steer": "z:1"}'}, "vllm_xargs.steer", "steer 'z' is unknown"),
        ({"vllm_xargs": '{"steer": {"a": 1}}'}, "vllm_xargs.steer", "takes a string"),
        ({"vllm_xargs": '{"steer_strengths": 1}'}, "vllm_xargs.steer_strengths", "not report"),
        ({"vllm_xargs": " " * (1 << 18)}, "vllm_xargs", "over 131072 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_steer_that_a_form_route_would_ignore_is_a_bad_request(
    client: TestClient, audio: Audio, path: str, fields: dict[str, str], param: str, message: str
) -> None:
    reply = send(client, path, **fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (param, "BadRequestError")
    assert re.search(message, error["message"]), error
    assert audio.request is None


def test_a_field_after_the_file_is_found(client: TestClient, audio: Audio) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b'\r\n--x\r\ncontent-disposition:form-data;name="steer"\r\n\r\na:3\r\n--x--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    reply = client.post(TRANSCRIPTIONS, content=head + AUDIO + tail, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "steer"


def test_a_malformed_form_gets_vllms_own_answer(client: TestClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    reply = client.post(TRANSCRIPTIONS, content=b"no form; steer", headers=headers)
    assert reply.status_code in (400, 422)
    assert "steer" not in reply.text.replace("no form; steer", "")


def test_the_check_keeps_little_of_a_form() -> None:
    from vllm_steer.serving.plan_transport import plan_of

    plan = plan_of(CONFIG)
    assert plan is not None
    check = FormCheck(b"x", plan, None)
    check.add(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n')
    for _ in range(64):
        check.add(AUDIO)
    kept = [value for value in vars(check).values() if isinstance(value, bytes | bytearray | str)]
    assert sum(map(len, kept)) < 1000
    assert len(check._parser.__dict__.get("buffer", b"")) < 1000


def events(client: TestClient, *sent: str) -> list[dict[str, Any]]:
    """The answers to some events, and to a last one of an unknown type."""
    with client.websocket_connect("/v1/realtime") as socket:
        assert socket.receive_json()["type"] == "session.created"
        for text in (*sent, '{"type": "last"}'):
            socket.send_text(text)
        replies = [socket.receive_json()]
        while replies[-1]["error"] != "Unknown event type: last":
            replies.append(socket.receive_json())
    return replies[:-1]


@pytest.mark.parametrize(
    ("event", "field"),
    [
        ({"type": "session.update", "model": "base", "steer": "a:3"}, "steer"),
        ({"type": "session.update", "model": "base:friendly"}, "model"),
        ({"type": "session.update", "model": "base", "vllm_xargs": {"steer": "a"}}, "vllm_xargs."),
        ({"type": "session.update", "session": {"model": "base:friendly"}}, "session.model"),
        ({"type": "input_audio_buffer.commit", "steering": {"a": 3}}, "steering"),
    ],
    ids=str,
)
def test_an_event_with_a_steer_is_answered_with_an_error_event(
    client: TestClient, event: dict[str, Any], field: str
) -> None:
    (reply,) = events(client, json.dumps(event))
    assert (reply["type"], reply["code"]) == ("error", "invalid_event")
    assert reply["error"].startswith(field)
    assert "this route does not support steering" in reply["error"]


def test_the_models_of_refused_events_are_not_set(client: TestClient) -> None:
    update = json.dumps({"type": "session.update", "model": "base:friendly"})
    commit = json.dumps({"type": "input_audio_buffer.commit"})
    assert [reply["code"] for reply in events(client, update, commit)] == [
        "invalid_event",
        "model_not_validated",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "session.update", "model": "steer"}',
        '{"type": "session.update", "model": "base", "note": "steer: friendly", "steer": null}',
    ],
)
def test_an_event_without_a_steer_reaches_vllm(client: TestClient, text: str) -> None:
    assert events(client, text) == []


def test_a_malformed_event_gets_vllms_own_answer(client: TestClient) -> None:
    assert [reply["code"] for reply in events(client, '{"steer": ')] == ["invalid_json"]


def test_without_a_steer_config_nothing_is_read(client: TestClient, audio: Audio) -> None:
    client.app.state.vllm_config = SimpleNamespace(additional_config={})  # type: ignore[attr-defined]
    assert send(client, TRANSCRIPTIONS, steer="a:3").status_code == 418
    assert events(client, '{"type": "session.update", "model": "base", "steer": "a"}') == []
