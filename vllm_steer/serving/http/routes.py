"""The requests that are read: for generated text, by JSON, by a form or by a websocket.

The lists hold vLLM's routes from 0.25.1 to 0.33. They are compared with the end of the path, as
an application may be served under a root path.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

MESSAGES: Final = "/v1/messages"
STEERABLE: Final = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/invocations",
    MESSAGES,
)
"""Routes whose bodies have ``vllm_xargs``."""
TOKENS_IN: Final = "/inference/v1/generate"
UNSTEERABLE: Final = (
    TOKENS_IN,
    "/generative_scoring",
    "/v1/systemone",
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/v1/responses/render",
    "/v1/messages/render",
)
"""Routes that generate text, or prepare such a request, without ``vllm_xargs``."""
RENDERS: Final = "/render"
"""How the paths of routes end that generate no text but prepare a request for it."""
FORMS: Final = ("/v1/audio/transcriptions", "/v1/audio/translations")
"""Routes whose bodies are multipart forms."""
REALTIME: Final = "/v1/realtime"


SITES: Final = "/v1/steer_sites"
"""Where the model can be steered."""
STEERS: Final = "/v1/steers"
"""The steers and presets that a request may name."""
PAGE: Final = "/steer"
"""The playground page. It is outside ``/v1``, which vLLM's check of API keys guards."""


class Route(NamedTuple):
    """How a route handles a body.

    passes_vllm_xargs  whether its ``vllm_xargs`` reach the engine
    is_anthropic       whether errors have Anthropic's form
    has_extra_args     whether the body holds ``sampling_params`` with ``extra_args`` of their own
    """

    passes_vllm_xargs: bool
    is_anthropic: bool = False
    has_extra_args: bool = False


def own_route(scope: Mapping[str, Any]) -> str | None:
    """The path of a request that the plugin answers itself; None for every other request.

    Only the root path may come before it: vLLM's check of API keys looks at the beginning.
    """
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return None
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path if path in (SITES, STEERS, PAGE) else None


def route_of(scope: Mapping[str, Any]) -> Route | None:
    """The route of a request whose body is to be read; None for every other request."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    route = route_at(scope["path"])
    return route if route is not None and _is_json(scope["headers"]) else None


def route_at(path: str) -> Route | None:
    """The route of a path; None for one that generates no text."""
    if path.endswith(MESSAGES):
        return Route(passes_vllm_xargs=_messages_carry(), is_anthropic=True)
    if path.endswith(STEERABLE):
        return Route(passes_vllm_xargs=True)
    if path.endswith(UNSTEERABLE):
        return Route(
            passes_vllm_xargs=False,
            is_anthropic=MESSAGES in path,
            has_extra_args=path.endswith(TOKENS_IN),
        )
    return None


def is_form(scope: Mapping[str, Any]) -> bool:
    """Whether a request may hold a multipart form for generated text."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return bool(scope["path"].endswith(FORMS))


def is_realtime(scope: Mapping[str, Any]) -> bool:
    """Whether a request opens a websocket for generated text."""
    return scope["type"] == "websocket" and bool(scope["path"].endswith(REALTIME))


def _is_json(headers: Any) -> bool:
    """True if vLLM parses the body as JSON: its content type is ``application/json``."""
    for name, value in headers:
        if name.lower() == b"content-type":
            return bool(value.lower().split(b";", 1)[0] == b"application/json")
    return False


@cache
def _messages_carry() -> bool:
    """True if Anthropic's route has ``vllm_xargs`` in the installed vLLM."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    return "vllm_xargs" in AnthropicMessagesRequest.model_fields
