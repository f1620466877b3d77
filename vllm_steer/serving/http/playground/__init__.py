"""The playground page: one HTML document without requests to any other server.

Style and script are written into the document, and its Content-Security-Policy allows exactly
these two by their hashes.

    page.html       the document; ``page.css`` and the scripts take the places of its two comments
    palette.css     the colours, light and dark
    page.css        everything else of the style
    *.js            one script in several files, in the order of ``SCRIPTS``
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from vllm_steer.serving.strength_reports.http_response import Send

_FOLDER: Final = Path(__file__).parent
STYLES: Final = ("palette.css", "page.css")
SCRIPTS: Final = (
    "elements.js",
    "server.js",
    "event_stream.js",
    "slider.js",
    "steer_rows.js",
    "request.js",
    "code_samples.js",
    "strengths.js",
    "answers.js",
    "sharing.js",
    "loading.js",
    "main.js",
)


class Page(NamedTuple):
    """The document and its HTTP headers."""

    body: bytes
    headers: list[tuple[bytes, bytes]]


@cache
def page() -> Page:
    """The page, put together once."""
    style = "\n".join(map(_source, STYLES))
    script = "\n".join(map(_source, SCRIPTS))
    document = _source("page.html").replace("/* style */", style).replace("/* script */", script)
    body = document.encode()
    return Page(body, _headers(_policy(style, script), len(body)))


async def send_page(send: Send) -> None:
    """Send the page as the whole response."""
    body, headers = page()
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _source(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: this style, this script, and requests to this server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _headers(policy: str, length: int) -> list[tuple[bytes, bytes]]:
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-length": str(length),
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()]
