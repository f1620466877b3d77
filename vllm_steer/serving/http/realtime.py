"""``/v1/realtime``: this route's requests have no steer; an event that names one is refused."""

import json
from collections.abc import Iterator
from typing import Any, Final

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.http.bad_request import BadRequest
from vllm_steer.serving.http.body_rewrite import ARGUMENTS, FIELDS, preset_of
from vllm_steer.serving.http.json_members import NULL, MemberReader, Members
from vllm_steer.serving.http.misspelled_fields import BODY_MISSPELLINGS, CLIENT_ONLY_FIELDS
from vllm_steer.serving.http.request_body import Message, Receive, SteerHints
from vllm_steer.serving.strength_reports.http_response import Send

_STEER_FIELDS: Final = (*FIELDS, *BODY_MISSPELLINGS)
_INSIDE: Final = ("session", ARGUMENTS, *CLIENT_ONLY_FIELDS)
_EVENT: Final = MemberReader((*_STEER_FIELDS, *_INSIDE, "model"))


def without_steers(receive: Receive, send: Send, plan: SteerPlan, hints: SteerHints) -> Receive:
    """A ``receive`` of events that name no steer; others are answered with an error event."""

    async def receive_unsteered() -> Message:
        while True:
            message = await receive()
            refused = _refusal(message.get("text"), plan, hints)
            if refused is None:
                return message
            event = {"type": "error", "error": refused, "code": "invalid_event"}
            await send({"type": "websocket.send", "text": json.dumps(event)})

    return receive_unsteered


def _refusal(text: Any, plan: SteerPlan, hints: SteerHints) -> str | None:
    if not isinstance(text, str) or not hints.are_in(data := text.encode("utf-8", "surrogatepass")):
        return None
    try:
        field = next(_steer_fields(_EVENT.read(data), plan), None)
    except BadRequest as refused:
        return str(refused)
    if field is None:
        return None
    return (
        f"{field}: this route does not support steering, except by the default of the server's "
        "steer config; remove the steer and name the base model"
    )


def _steer_fields(event: Members, plan: SteerPlan, place: str = "") -> Iterator[str]:
    yield from (f"{place}{name}" for name in _STEER_FIELDS if event.get(name, NULL) != NULL)
    model = event.get("model", NULL)
    if model.startswith(b'"') and preset_of(json.loads(model), plan) is not None:
        yield f"{place}model"
    if not place:
        for name in _INSIDE:
            yield from _steer_fields(_EVENT.read(event.get(name, NULL)), plan, f"{name}.")
