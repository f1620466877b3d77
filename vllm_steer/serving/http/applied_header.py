"""The response header ``X-Steer``, on every response of a server with a steer config."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from vllm_steer.config import NO_STEER
from vllm_steer.serving.applied import HEADER
from vllm_steer.serving.strength_reports.http_response import Send

_KEY: Final = "vllm_steer.applied"
_NAME: Final = HEADER.lower().encode()


@dataclass
class AppliedHeader:
    """The header of one response; the innermost middleware sets its value."""

    value: str = NO_STEER


def header_of(scope: MutableMapping[str, Any]) -> AppliedHeader:
    """The header of a request's response; one that nobody sends where there is none."""
    header: AppliedHeader = scope.get(_KEY) or AppliedHeader()
    return header


def with_header(scope: MutableMapping[str, Any], send: Send) -> tuple[Any, Send]:
    """The scope and the ``send`` of a request whose response gets the header.

    A response with an error has ``none``: nothing was steered.
    """
    header = AppliedHeader()

    async def send_with_header(message: MutableMapping[str, Any]) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            is_error = message.get("status", 200) >= 400
            value = NO_STEER if is_error else header.value
            message = {
                **message,
                "headers": [*message.get("headers", ()), (_NAME, value.encode("latin-1"))],
            }
        await send(message)

    return {**scope, _KEY: header}, send_with_header
