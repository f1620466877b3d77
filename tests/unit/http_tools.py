"""What tests of the middleware share."""

import json
from typing import Any

from vllm_steer.serving.http.routes import route_at


def carries(path: str) -> bool:
    route = route_at(path)
    return route is not None and route.carries


def load(body: bytes) -> Any:
    """A body as vLLM reads it, without fields of ours that are empty."""
    data = json.loads(body)
    return {k: v for k, v in data.items() if v is not None or k not in ("steer", "steer_strengths")}


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()
