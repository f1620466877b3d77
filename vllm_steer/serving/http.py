"""The HTTP side: ``steer`` and ``steer_strengths`` in the body, and ``BASE:preset`` as the model.

A plain ASGI middleware, added through vLLM's own ``--middleware``. It moves what the request body
asks for into ``vllm_xargs``, which vLLM carries to ``SamplingParams``; checks and messages are
those of admission. A body that mentions none of it is passed on as the bytes it came as, and only
a response that is to tell its strengths is touched on its way back.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm_steer.config import NO_STEER
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.admission import STRENGTHS, asked_strengths
from vllm_steer.serving.dynamic_admission import check_engine_for
from vllm_steer.serving.engine_config import plan_of
from vllm_steer.serving.reports.delivered import DELIVERED, Delivered
from vllm_steer.serving.reports.response import Message, ReportingSend, Send, with_length
from vllm_steer.serving.streams.stream import STREAM, is_dynamic

Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

STEERABLE = ("/completions", "/completions/batch", "/responses", "/invocations")
MESSAGES = "/messages"

FIELDS = ("steer", STRENGTHS)
COUNTING = ("/tokenize", "/detokenize", "/count_tokens")


class SteerMiddleware:
    """Moves what a body says about steering to where vLLM looks for it."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        vllm_config = scope["app"].state.vllm_config
        plan = plan_of(vllm_config)
        if plan is None:
            return await self._app(scope, receive, send)
        body = await _read_body(receive)
        try:
            new_body, reports = rewrite(body, plan, route=scope["path"], vllm_config=vllm_config)
        except ValueError as error:
            return await _reject(send, str(error))
        if new_body is not body:
            scope = {**scope, "headers": with_length(scope["headers"], len(new_body))}
        receive = _replay(new_body, receive)
        if not reports:
            return await self._app(scope, receive, send)
        delivered = Delivered()
        before = DELIVERED.set(delivered)
        try:
            await self._app(scope, receive, ReportingSend(send, delivered))
        finally:
            DELIVERED.reset(before)


class Rewritten(NamedTuple):
    """A request's body as vLLM is to see it, and whether the response tells the strengths."""

    body: bytes
    reports: bool


def rewrite(body: bytes, plan: SteerPlan, *, route: str, vllm_config: Any = None) -> Rewritten:
    """The body with ``steer``, ``steer_strengths`` and the model's preset in ``vllm_xargs``.

    ``vllm_config`` is the engine's, where it is known. The body is the same object if there is
    nothing to move. Raises ``ValueError`` with the message for the client if the body asks twice,
    or asks on a route that takes no ``vllm_xargs``.
    """
    data = _read_json(body, plan)
    if data is None:
        return Rewritten(body, False)
    given = data.get("vllm_xargs")
    inside = given if isinstance(given, dict) else {}
    fields = {name: data[name] for name in FIELDS if data.get(name) is not None}
    asked = {name: inside[name] for name in FIELDS if inside.get(name) is not None} | fields
    preset = preset_of(data.get("model"), plan)
    if not asked and (preset is None or route.endswith(COUNTING)):
        return Rewritten(body, False)
    if not _takes_arguments(route):
        raise ValueError(
            "steer: this route cannot carry a steer; remove it and name the base model"
        )
    if twice := [name for name in fields if name in inside]:
        raise ValueError(f"{twice[0]} is given both as a field and in vllm_xargs; give it once")
    if not isinstance(given, dict | None):
        raise ValueError(f"vllm_xargs is {type(given).__name__}; an object is wanted")
    if preset is not None:
        asked.setdefault("steer", preset)
    if data.get("use_beam_search") and asked.get("steer", NO_STEER) not in (NO_STEER, "", {}):
        raise ValueError(
            "steer: beam search cannot carry a steer; sample instead, or remove the steer"
        )
    arguments = {**inside, **{name: _as_argument(value) for name, value in asked.items()}}
    is_admitted = STREAM not in inside and _is_admitted(asked, plan, vllm_config)
    reports = is_admitted and _asks_for_strengths(asked)
    if is_admitted and arguments == inside:
        return Rewritten(body, reports)
    left_out = FIELDS if is_admitted else (*FIELDS, "stream", "stream_options")
    data = {name: value for name, value in data.items() if name not in left_out}
    return Rewritten(json.dumps({**data, "vllm_xargs": arguments}).encode(), reports)


def _read_json(body: bytes, plan: SteerPlan) -> dict[str, Any] | None:
    """The body if it may ask for anything of ours, None if it is vLLM's alone."""
    if not _may_ask(body, plan):
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM answers it as it answers any malformed body
    return data if isinstance(data, dict) else None


def _takes_arguments(route: str) -> bool:
    """Whether the route's body has ``vllm_xargs``; Anthropic's has in newer vLLM versions only."""
    if route.endswith(MESSAGES):
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        return "vllm_xargs" in AnthropicMessagesRequest.model_fields
    return route.endswith(STEERABLE)


def _is_admitted(asked: Mapping[str, Any], plan: SteerPlan, vllm_config: Any) -> bool:
    """Whether admission will take the values. vLLM would answer a stream with 200 before it asks;
    without streaming its answer is the 400, and it comes from behind the check of API keys.
    """
    try:
        doses = plan.doses(asked.get("steer"))
        _asks_for_strengths(asked)
        if vllm_config is not None and is_dynamic(doses):
            check_engine_for(doses, plan, vllm_config)
    except SteerRequestError:
        return False
    return True


def _asks_for_strengths(asked: Mapping[str, Any]) -> bool:
    return asked_strengths(SimpleNamespace(extra_args=asked))


def _may_ask(body: bytes, plan: SteerPlan) -> bool:
    """Whether the bytes can mention a steer or a preset: spelled out, escaped, or in UTF-16."""
    hints = (b"steer", b"\\u", b"\0")
    return any(h in body for h in hints) or any(f":{p}".encode() in body for p in plan.presets)


def preset_of(model: Any, plan: SteerPlan) -> str | None:
    """The preset in a model name ``BASE:preset``, None if it names none."""
    name = model.rpartition(":")[2] if isinstance(model, str) and ":" in model else None
    return name if name in plan.presets else None


def _as_argument(value: Any) -> Any:
    """vLLM's extra arguments take no nested objects: those travel as JSON in a string."""
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return value if plain else json.dumps(value)


async def _read_body(receive: Receive) -> bytes:
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then whatever comes, such as a disconnect."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _reject(send: Send, message: str) -> None:
    error = {
        "message": message,
        "type": "BadRequestError",
        "param": "vllm_xargs.steer",
        "code": 400,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
