"""The middleware: its place in vLLM's application, and how it handles a request.

vLLM puts middlewares that are named on its command line outside all others, its check of API keys
among them. Nothing of a request may be read out there: the class that vLLM adds only puts another
one inside, between all middlewares and the routes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.http.members import Read, Slow
from vllm_steer.serving.http.received import Hints, Message, Receive, ReceivedBody
from vllm_steer.serving.http.refusal import Refused, refuse
from vllm_steer.serving.http.rewriting import BODY, rewrite
from vllm_steer.serving.http.routes import Route, route_of
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.strength_reports.delivery import RESPONSE_STRENGTHS, ResponseStrengths
from vllm_steer.serving.strength_reports.http_response import Send, StrengthsInResponse, with_length

App = Callable[[Message, Receive, Send], Awaitable[None]]

_LARGE: Final = 1 << 20
"""Bytes; a larger body is joined without the GIL, and read, in a thread."""


class SteerMiddleware:
    """What vLLM adds, outermost: it puts ``Steering`` innermost and is passed through."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        place_innermost(scope["app"])
        await self._app(scope, receive, send)


def place_innermost(app: Any) -> None:
    """Put ``Steering`` around the routes of a Starlette application, once.

    A router has a stack of middlewares of its own, inside those of the application. It is made new
    here by one call that waits for nothing, so requests that come at once find it done or undone;
    no other middleware is built again.
    """
    router = app.router
    if not isinstance(router.middleware_stack, Steering):
        router.middleware_stack = Steering(router.middleware_stack)


class Steering:
    """Moves what a body says about steering to where vLLM looks for it."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._hints: tuple[SteerPlan, Hints] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        route = route_of(scope)
        if route is None:
            return await self._app(scope, receive, send)
        vllm_config = scope["app"].state.vllm_config  # without one a steer would be lost: an error
        plan = plan_of(vllm_config)
        if plan is None:
            return await self._app(scope, receive, send)
        body = ReceivedBody(self._hints_of(plan))
        reports = False
        if await body.receive(receive) and body.may_ask:
            before = body.length
            try:
                reports = await _rewrite(body, plan, route, vllm_config)
            except Refused as refused:
                return await refuse(send, refused, route)
            if body.length != before:
                scope = {**scope, "headers": with_length(scope["headers"], body.length)}
        await self._pass_on(scope, body.replay(receive), send, reports)

    async def _pass_on(self, scope: Message, receive: Receive, send: Send, reports: bool) -> None:
        if not reports:
            return await self._app(scope, receive, send)
        delivered = ResponseStrengths()
        before = RESPONSE_STRENGTHS.set(delivered)
        try:
            await self._app(scope, receive, StrengthsInResponse(send, delivered))
        finally:
            RESPONSE_STRENGTHS.reset(before)

    def _hints_of(self, plan: SteerPlan) -> Hints:
        if self._hints is None or self._hints[0] is not plan:
            self._hints = plan, Hints(plan.presets)
        return self._hints[1]


async def _rewrite(body: ReceivedBody, plan: SteerPlan, route: Route, vllm_config: Any) -> bool:
    """Append to the body what it needs to; whether the response tells the strengths."""
    large = body.length > _LARGE
    read = await asyncio.to_thread(_read, body) if large else _read(body)
    if read.members is None:
        return False
    try:
        wanted = rewrite(read.members, plan, route, vllm_config)
    except UnicodeDecodeError:  # vLLM cannot read it either, and answers
        return False
    if wanted.members:
        body.append(wanted.members, to=read.text)
    return wanted.reports


def _read(body: ReceivedBody) -> Read:
    """The members of the body that matter; none if it is no JSON object."""
    text = body.whole()
    try:
        return Read(BODY.read_fast(text))
    except Slow:
        return BODY.read_slowly(text)
