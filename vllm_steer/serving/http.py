"""The HTTP side: a ``steer`` field in the body and ``BASE:preset`` as the model.

A plain ASGI middleware, added through vLLM's own ``--middleware``. It rewrites the request body to
``vllm_xargs.steer``, which vLLM carries to ``SamplingParams``; checks and messages are those of
admission. A body that mentions neither is passed on as the bytes it came as.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_steer.config import NO_STEER
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.engine_config import plan_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

STEERABLE = ("/completions", "/completions/batch", "/responses", "/invocations")
MESSAGES = "/messages"

COUNTING = ("/tokenize", "/detokenize", "/count_tokens")


class SteerMiddleware:
    """Moves what a body says about steering to where vLLM looks for it."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        plan = plan_of(scope["app"].state.vllm_config)
        if plan is None:
            return await self._app(scope, receive, send)
        body = await _read_body(receive)
        try:
            new_body = rewrite(body, plan, route=scope["path"])
        except ValueError as error:
            return await _reject(send, str(error))
        if new_body is not body:
            scope = {**scope, "headers": _with_length(scope["headers"], len(new_body))}
        return await self._app(scope, _replay(new_body, receive), send)


def rewrite(body: bytes, plan: SteerPlan, *, route: str) -> bytes:
    """The body with ``steer`` and the model's preset moved into ``vllm_xargs``.

    Returns the same object if there is nothing to move. Raises ``ValueError`` with the message for
    the client if the body asks twice, or asks on a route that takes no ``vllm_xargs``.
    """
    if not _may_ask(body, plan):
        return body
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return body  # vLLM answers it as it answers any malformed body
    if not isinstance(data, dict):
        return body
    field = data.get("steer")
    arguments = data.get("vllm_xargs")
    in_arguments = isinstance(arguments, dict) and "steer" in arguments
    preset = preset_of(data.get("model"), plan)
    only_preset = field is None and not in_arguments
    if only_preset and (preset is None or route.endswith(COUNTING)):
        return body
    if not _takes_arguments(route):
        raise ValueError(
            "steer: this route cannot carry a steer; remove it and name the base model"
        )
    if field is not None and in_arguments:
        raise ValueError("steer is given both as a field and in vllm_xargs; give it once")
    if not isinstance(arguments, dict | None):
        raise ValueError(f"vllm_xargs is {type(arguments).__name__}; an object is wanted")
    data.pop("steer", None)
    arguments = arguments or {}
    steer = arguments.get("steer", preset if field is None else field)
    if data.get("use_beam_search") and steer not in (NO_STEER, "", {}):
        raise ValueError(
            "steer: beam search cannot carry a steer; sample instead, or remove the steer"
        )
    argument = _as_argument(steer)
    if not _is_admitted(steer, plan):
        data = {k: v for k, v in data.items() if k not in ("stream", "stream_options")}
    elif in_arguments and argument is steer:
        return body
    data["vllm_xargs"] = {**arguments, "steer": argument}
    return json.dumps(data).encode()


def _takes_arguments(route: str) -> bool:
    """Whether the route's body has ``vllm_xargs``; Anthropic's has in newer vLLM versions only."""
    if route.endswith(MESSAGES):
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        return "vllm_xargs" in AnthropicMessagesRequest.model_fields
    return route.endswith(STEERABLE)


def _is_admitted(steer: Any, plan: SteerPlan) -> bool:
    """Whether admission will take the value. vLLM would answer a stream with 200 before it asks;
    without streaming its answer is the 400, and it comes from behind the check of API keys.
    """
    try:
        plan.doses(steer)
    except SteerRequestError:
        return False
    return True


def _may_ask(body: bytes, plan: SteerPlan) -> bool:
    """Whether the bytes can mention a steer or a preset: spelled out, escaped, or in UTF-16."""
    hints = (b"steer", b"\\u", b"\0")
    return any(h in body for h in hints) or any(f":{p}".encode() in body for p in plan.presets)


def preset_of(model: Any, plan: SteerPlan) -> str | None:
    """The preset in a model name ``BASE:preset``, None if it names none."""
    name = model.rpartition(":")[2] if isinstance(model, str) and ":" in model else None
    return name if name in plan.presets else None


def _as_argument(steer: Any) -> Any:
    """vLLM's extra arguments take no nested objects: those travel as JSON in a string."""
    plain = isinstance(steer, str | int | float) and not isinstance(steer, bool)
    return steer if plain else json.dumps(steer)


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


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


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
