"""``POST /v1/load_steer`` and ``/v1/unload_steer``: they change what a server has loaded.

The outermost middleware answers them: they have a key of their own, which vLLM's check of API keys
does not know. A body is read once its sender has the right.
"""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from vllm_steer.config import LONGEST_NAME
from vllm_steer.environment import API_KEY
from vllm_steer.errors import SteerError
from vllm_steer.files.json_text import read_json
from vllm_steer.plan import SteerPlan
from vllm_steer.runtime.refusal import BAD_REQUEST, NO_RIGHT, NOT_FOUND, TOO_LARGE, Refused
from vllm_steer.runtime.steer_file import check_name, decoded, path_in
from vllm_steer.serving.http.json_response import send_json
from vllm_steer.serving.http.request_body import Message, Receive
from vllm_steer.serving.metrics.loads import (
    Outcome,
    count_load,
    count_unload,
    log_load,
    set_slots,
)
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.runtime.listing import steer_entry
from vllm_steer.serving.runtime.loading import SteerLoading, SteerSource
from vllm_steer.serving.runtime.server import loading_of
from vllm_steer.serving.strength_reports.http_response import Send
from vllm_steer.steers import SAESteer
from vllm_steer.untrusted_text import listed, message, shown

logger = logging.getLogger("vllm.vllm_steer")

LOAD: Final = "/v1/load_steer"
UNLOAD: Final = "/v1/unload_steer"
METRICS: Final = "/metrics"
MIB: Final = 1 << 20
_SLOTS_WITHIN: Final = 2.0
"""Seconds that a scrape of the metrics waits for the engines."""
_OTHER_BYTES: Final = 1 << 16
"""Of a body beside the file: names, options."""
_SOURCES: Final = ("steer_path", "steer_data")
_TYPES: Final = {NO_RIGHT: "AuthenticationError", NOT_FOUND: "NotFoundError"}
_FAILED: Final = 500


def is_change(scope: Mapping[str, Any]) -> bool:
    """Whether a request changes what is loaded."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return bool(scope["path"].endswith((LOAD, UNLOAD)))


def is_scrape(scope: Mapping[str, Any]) -> bool:
    """Whether a request reads the server's metrics."""
    return scope["type"] == "http" and bool(scope["path"].endswith(METRICS))


async def show_slots(state: Any) -> None:
    """Set the metrics of the reserved room to what holds now."""
    plan = plan_of(getattr(state, "vllm_config", None)) if hasattr(state, "engine_client") else None
    if plan is None or not plan.runtime.enabled:
        return
    try:
        room = await asyncio.wait_for(loading_of(state.engine_client).room(), _SLOTS_WITHIN)
    except Exception as error:  # the engine has died, which other metrics show
        logger.warning("vllm-steer: the room in use is not known: %s", type(error).__name__)
        return
    for region, (used, total) in room.items():
        set_slots(region, used, total)


async def answer_change(scope: Message, receive: Receive, send: Send) -> None:
    """Carry out a change, and answer it."""
    state = scope["app"].state
    try:
        plan = plan_of(state.vllm_config)
        if plan is None or not plan.runtime.enabled:
            raise Refused(
                "this server loads no steers; set runtime: {enabled: true} in its steer config",
                NOT_FOUND,
            )
        _check_key(scope, plan)
        fields = _fields(await _body(receive, _longest(plan)))
        loading = loading_of(state.engine_client)
        change = _load if scope["path"].endswith(LOAD) else _unload
        await send_json(send, await change(fields, loading))
    except SteerError as error:
        refused = error if isinstance(error, Refused) else Refused(str(error))
        await send_json(send, refusal_body(refused), status=refused.status)
    except Exception:
        logger.exception("vllm-steer: %s failed", scope["path"])
        failed = Refused("the change failed; the server's log says why", _FAILED)
        await send_json(send, refusal_body(failed), status=_FAILED)


def refusal_body(refused: Refused) -> dict[str, Any]:
    """The error body, in OpenAI's format."""
    kind = _TYPES.get(refused.status, "BadRequestError")
    if refused.status == _FAILED:
        kind = "InternalServerError"
    error = {"message": str(refused), "type": kind, "param": None, "code": refused.status}
    return {"error": error}


async def _load(fields: dict[str, Any], loading: SteerLoading) -> Any:
    name, in_place = fields.pop("steer_name", None), fields.pop("load_inplace", False)
    if not isinstance(in_place, bool):
        raise Refused(f"load_inplace is {shown(in_place)}; expected true or false", BAD_REQUEST)
    given = [source for source in _SOURCES if fields.get(source) is not None]
    if len(given) != 1:
        raise Refused("give one of steer_path and steer_data, the file in base64", BAD_REQUEST)
    runtime = loading.plan.runtime
    path, data = (fields.pop(source, None) for source in _SOURCES)
    if "path" in fields:
        raise Refused("path is not a field here; use steer_path", BAD_REQUEST)
    file = (
        path_in(runtime.folders, path, with_config=fields.get("kind") == SAESteer.kind)
        if data is None
        else decoded(data, "steer_data", runtime.upload_mib * MIB)
    )
    name = check_name(name)
    before, started, planned = loading.registry.names().steers, time.monotonic(), None
    outcome: Outcome = "refused"
    try:
        planned = await loading.load(name, SteerSource(file, fields), in_place=in_place)
        outcome = "replaced" if name in before else "loaded"
    finally:
        seconds = time.monotonic() - started
        source = "request" if isinstance(file, bytes) else str(file)
        count_load(outcome, seconds)
        log_load(name, planned.content if planned else "", source, seconds, outcome)
    return steer_entry(name, planned, loading.plan.limits.max_strength, 0)


async def _unload(fields: dict[str, Any], loading: SteerLoading) -> Any:
    name = fields.pop("steer_name", None)
    if fields:
        raise Refused(f"unknown fields {listed(sorted(fields))}; expected steer_name", BAD_REQUEST)
    planned = await loading.unload(name)
    count_unload()
    return {"id": name, "object": "steer", "digest": planned.content, "unloaded": True}


def _check_key(scope: Message, plan: SteerPlan) -> None:
    """Raise ``Refused`` unless the request has the key of changes."""
    if plan.runtime.unprotected:
        return
    key = os.environ.get(API_KEY, "")
    given = b"".join(v for name, v in scope["headers"] if name.lower() == b"authorization")
    if not key or not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise Refused(
            f"changes need the header 'Authorization: Bearer KEY' with the key of {API_KEY}",
            NO_RIGHT,
        )


def _longest(plan: SteerPlan) -> int:
    """Bytes of the longest body that can be right: a file in base64, and the other fields."""
    return plan.runtime.upload_mib * MIB // 3 * 4 + 4 + _OTHER_BYTES + LONGEST_NAME


async def _body(receive: Receive, most: int) -> bytes:
    chunks, length, more = [], 0, True
    while more:
        received = await receive()
        if received["type"] != "http.request":
            raise Refused("the client left before the end of its request", BAD_REQUEST)
        chunks.append(received.get("body", b""))
        length += len(chunks[-1])
        if length > most:
            raise Refused(
                f"the request has more than {most} bytes; runtime.upload_mib bounds a file",
                TOO_LARGE,
            )
        more = received.get("more_body", False)
    return b"".join(chunks)


def _fields(body: bytes) -> dict[str, Any]:
    try:
        data = read_json(body.decode(), "the request")
    except UnicodeDecodeError:
        raise Refused("the request is not in UTF-8", BAD_REQUEST) from None
    except SteerError as error:
        raise Refused(message(str(error)), BAD_REQUEST) from None
    if not isinstance(data, dict):
        raise Refused(
            'the request is no object; expected one such as {"steer_name": "detox", '
            '"steer_path": "/srv/steers/detox.safetensors"}',
            BAD_REQUEST,
        )
    return data
