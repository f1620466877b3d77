"""A client that takes no unsteered answer for a steered one.

A server without vllm-steer, or without a steer config, ignores the field ``steer``: it answers with
status 200 and plain text. Only the response header ``X-Steer`` says what acted.
"""

from collections.abc import Mapping
from typing import Any

from openai import OpenAI


class NotSteered(RuntimeError):
    """The server answered, and not under the steers that were asked for."""


def steered(
    client: OpenAI, steer: Any, *, required: Mapping[str, str] | None = None, **request: Any
) -> Any:
    """``client.chat.completions.create(**request)`` with a steer: the completion or, with
    ``stream=True``, its chunks.

    ``required`` maps steers that must have acted to the beginning of their digest, '' for any.
    Raises ``NotSteered`` before any text is handed out.
    """
    response = client.chat.completions.with_raw_response.create(
        **request, extra_body={"steer": steer}
    )
    try:
        check_steered(response.headers.get("X-Steer"), required or {})
    except NotSteered:
        response.http_response.close()  # a stream that nobody reads would keep its connection
        raise
    return response.parse()


def check_steered(header: str | None, required: Mapping[str, str]) -> None:
    """Raise ``NotSteered`` unless the header names steers, and all the required ones.

    The header has ``name:strength@digest`` for each steer, joined by commas, or is ``none``.
    """
    if header is None:
        raise NotSteered("the response has no header X-Steer: this server does not steer")
    if header.strip() in ("", "none"):
        raise NotSteered("the header X-Steer is none: the server applied no steer")
    digests = {}
    for part in header.split(","):
        name, _, rest = part.strip().partition(":")
        digests[name] = rest.partition("@")[2]
    for name, digest in required.items():
        if name not in digests or not digests[name].startswith(digest):
            wanted = f"{name}@{digest}" if digest else name
            raise NotSteered(f"{wanted} was asked for; the server applied {header}")
