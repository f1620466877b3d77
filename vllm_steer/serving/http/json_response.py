"""An answer in JSON that the middleware gives itself."""

import json
from typing import Any

from vllm_steer.serving.strength_reports.http_response import Send


async def send_json(send: Send, data: Any, *, status: int = 200) -> None:
    """Send ``data`` as the whole response."""
    body = json.dumps(data).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
