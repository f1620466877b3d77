"""``vllm run-batch``: the steer fields of each line of a batch file, which no middleware reads.

A line's body is rewritten before vLLM parses it, as ``serving.http`` rewrites the body of an HTTP
request. vLLM parses every line before it runs the first, and an error there ends the run: a line
that cannot be served is parsed without its steer fields and gets its error entry, with status 400,
where it would have been run.
"""

import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.http.bad_request import BadRequest
from vllm_steer.serving.http.body_rewrite import ARGUMENTS, BODY, FIELDS, Rewrite, rewrite
from vllm_steer.serving.http.json_members import NULL, MemberReader, Members
from vllm_steer.serving.http.request_body import SteerHints
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import SENT_FIELDS, STEER, STRENGTHS, RejectedSteer
from vllm_steer.serving.strength_reports.delivery import RESPONSE_STRENGTHS, ResponseStrengths

Handler = Callable[[Any], Awaitable[Any]]

_ENGINE_CONFIG: ContextVar[Any] = ContextVar("vllm_steer_batch_engine_config", default=None)
_ATTRIBUTE: Final = "steer_line"
_LINE: Final = MemberReader(("url", "body", *FIELDS))
_ROUTE: Final = Route(passes_vllm_xargs=True)
_URLS: Final = (
    b'"/v1/chat/completions"',
    b'"/v1/audio/transcriptions"',
    b'"/v1/audio/translations"',
)
"""The URLs of lines that generate text."""


@dataclass(frozen=True)
class SteeredLine:
    """What is known of a line: its rewrite, or why it cannot be served."""

    rewrite: Rewrite
    refused: BadRequest | None = None


async def with_engine_config(
    original: Callable[..., Awaitable[None]], engine_client: Any, *args: Any, **kwargs: Any
) -> None:
    """``run_batch``, whose lines are read under the plan of ``engine_client``."""
    before = _ENGINE_CONFIG.set(engine_client.vllm_config)
    try:
        await original(engine_client, *args, **kwargs)
    finally:
        _ENGINE_CONFIG.reset(before)


def with_steer_fields(batch_request_input: Any) -> Any:
    """The class of a line, whose ``model_validate_json`` moves steer fields to ``vllm_xargs``."""
    if hasattr(batch_request_input, "moves_steer_fields"):
        return batch_request_input

    class SteeredBatchRequestInput(batch_request_input):  # type: ignore[misc]
        moves_steer_fields: ClassVar[bool] = True

        @classmethod
        def model_validate_json(cls, json_data: Any, **kwargs: Any) -> Any:
            vllm_config = _ENGINE_CONFIG.get()
            plan = plan_of(vllm_config)
            if plan is None or not SteerHints(plan.presets).are_in(json_data.encode()):
                return batch_request_input.model_validate_json(json_data, **kwargs)
            text, line = _read(json_data, plan, vllm_config)
            request = batch_request_input.model_validate_json(text, **kwargs)
            if line is not None:
                setattr(request, _ATTRIBUTE, line)
            return request

    return SteeredBatchRequestInput


async def with_line(
    original: Callable[..., Awaitable[Any]], handler: Handler, request: Any, *args: Any, **kw: Any
) -> Any:
    """``run_request`` for a line that may be steered, or that is refused."""
    line: SteeredLine | None = getattr(request, _ATTRIBUTE, None)
    if line is None:
        return await original(handler, request, *args, **kw)
    if line.refused is not None:
        handler = _refusing(line.refused)
    elif line.rewrite.reports:
        handler = _reporting(handler)
    before = SENT_FIELDS.set(line.rewrite.fields)
    try:
        return await original(handler, request, *args, **kw)
    finally:
        SENT_FIELDS.reset(before)


def _read(text: str, plan: SteerPlan, vllm_config: Any) -> tuple[str, SteeredLine | None]:
    """A line as vLLM is to parse it; None for one that vLLM reads without our help."""
    members = _LINE.read(text.encode())
    body = members.get("body", NULL)
    if members.get("url") not in _URLS or not body.startswith(b"{"):
        return text, None
    line = json.loads(text)
    try:
        _check_outer_fields(members)
        rewritten = rewrite(BODY.read(body), plan, _ROUTE, vllm_config)
    except BadRequest as refused:
        removed = (*FIELDS, ARGUMENTS)
        kept = {name: value for name, value in line["body"].items() if name not in removed}
        return json.dumps(line | {"body": kept}), SteeredLine(Rewrite(), refused)
    if rewritten.members:
        line["body"] = json.loads(body[:-1] + rewritten.members + b"}")
    return json.dumps(line), SteeredLine(rewritten)


def _check_outer_fields(members: Members) -> None:
    for name in FIELDS:
        if members.get(name, NULL) != NULL:
            raise BadRequest(f"{name} is beside the body of the line; put it into the body", name)


def _refusing(refused: BadRequest) -> Handler:
    async def refuse(body: Any) -> Any:
        SENT_FIELDS.set({STEER: refused.parameter})
        raise RejectedSteer(str(refused))

    return refuse


def _reporting(handler: Handler) -> Handler:
    """A handler whose response has the strengths of each choice."""

    async def report(body: Any) -> Any:
        delivered = ResponseStrengths()
        before = RESPONSE_STRENGTHS.set(delivered)
        try:
            response = await handler(body)
        finally:
            RESPONSE_STRENGTHS.reset(before)
        for choice in getattr(response, "choices", ()):
            setattr(choice, STRENGTHS, delivered.take(response.id, choice.index))
        return response

    return report
