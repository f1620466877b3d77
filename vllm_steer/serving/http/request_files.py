"""``steer_files`` in a body: steers that a request brings, by the names that its ``steer`` uses.

A value is a file in base64, or an object with the file as ``steer_data`` and the keys of a steer in
a config. The files are taken out of the body before vLLM parses it.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.request.gates import names_in
from vllm_steer.runtime.refusal import BAD_REQUEST, CONFLICT, Refused
from vllm_steer.runtime.steer_file import check_name, decoded
from vllm_steer.serving.http.bad_request import BadRequest
from vllm_steer.serving.http.body_rewrite import FILES
from vllm_steer.serving.http.json_members import NULL, Members
from vllm_steer.serving.http.steer_changes import MIB
from vllm_steer.serving.runtime.loading import SteerLoading, SteerSource
from vllm_steer.untrusted_text import listed, shown

FIELD: Final = FILES
_LONG: Final = 256


async def steers_of_body(
    members: Members, steer: Any, loading: SteerLoading
) -> Mapping[str, PlannedSteer]:
    """The steers that a body brings, on all engines; empty for a body without any.

    ``steer`` is the body's ``steer`` value. Raises ``BadRequest``.
    """
    text = members.get(FIELD, NULL)
    if text == NULL:
        return {}
    try:
        sources = await asyncio.to_thread(_sources, text, loading.plan)
        _check_names(sources, steer, loading.plan)
        return await loading.of_request(sources)
    except Refused as refused:
        raise BadRequest(str(refused), FIELD, refused.status) from None


def without_files(body: bytes, members: Members) -> bytes:
    """The body with null in place of its files: a text that is long occurs nowhere else in it.

    A short one stays, and vLLM ignores it.
    """
    text = members[FIELD]
    return body if len(text) < _LONG else body.replace(text, NULL)


def _sources(text: bytes, plan: SteerPlan) -> dict[str, SteerSource]:
    most = plan.runtime.upload_mib * MIB
    if len(text) > plan.limits.max_steers_per_request * (most // 3 * 4 + 1000):
        raise Refused(f"{FIELD} has {len(text)} bytes, more than all of its steers may have", 413)
    try:
        files = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{FIELD} is not JSON ({type(error).__name__})", BAD_REQUEST) from None
    if not isinstance(files, dict):
        raise Refused(
            f"{FIELD} is {shown(files)}; expected an object of names and files in base64",
            BAD_REQUEST,
        )
    return {check_name(name): _source(name, value, most) for name, value in files.items()}


def _source(name: str, value: Any, most: int) -> SteerSource:
    options: dict[str, Any] = {}
    field = f"{FIELD}.{name}"
    if isinstance(value, dict):
        options = dict(value)
        value, field = options.pop("steer_data", None), f"{field}.steer_data"
        if "path" in options:
            raise Refused(f"{FIELD}.{name}: path is not a key here", BAD_REQUEST)
    return SteerSource(decoded(value, field, most), options)


def _check_names(sources: Mapping[str, SteerSource], steer: Any, plan: SteerPlan) -> None:
    """Raise ``Refused`` for names of the config, and for files that the request does not use."""
    for name in sources:
        if name in plan.steers or name in plan.presets:
            raise Refused(f"{FIELD}: {name} is a name of the steer config", CONFLICT)
    try:
        used = names_in(steer) if steer is not None else frozenset()
    except (SteerError, SteerRequestError):
        used = frozenset(sources)  # the error of the value itself follows
    unused = sorted(set(sources) - used)
    if unused:
        raise Refused(
            f"{FIELD} has {listed(unused)}, which steer does not name; name it in steer, or remove "
            "the file",
            BAD_REQUEST,
        )
