"""The middleware: its place in vLLM's application, and how it handles a request.

vLLM puts middlewares of its command line outside all others, including its check of API keys. A
request must not be read before that check, so the class that vLLM adds only inserts another one
between all middlewares and the routes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.applied import header_value
from vllm_steer.serving.http.applied_header import header_of, with_header
from vllm_steer.serving.http.bad_request import BadRequest, send_bad_request
from vllm_steer.serving.http.body_rewrite import BODY, FILES, Rewrite, rewrite, steer_value
from vllm_steer.serving.http.forms import FormCheck, boundary_of, pass_form
from vllm_steer.serving.http.json_members import NULL, Members, MsgspecRefused, ParsedBody
from vllm_steer.serving.http.json_response import send_json
from vllm_steer.serving.http.playground import send_page
from vllm_steer.serving.http.realtime import without_steers
from vllm_steer.serving.http.request_body import Message, Receive, ReceivedBody, SteerHints
from vllm_steer.serving.http.request_files import steers_of_body, without_files
from vllm_steer.serving.http.routes import (
    PAGE,
    RENDERS,
    SITES,
    STEERS,
    Route,
    is_form,
    is_realtime,
    own_route,
    route_of,
)
from vllm_steer.serving.http.steer_changes import answer_change, is_change, is_scrape, show_slots
from vllm_steer.serving.http.steer_list import listed_steers
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import SENT_FIELDS
from vllm_steer.serving.runtime.names import REQUEST_NAMES, doses_now, registry_of
from vllm_steer.serving.runtime.server import loading_of
from vllm_steer.serving.strength_reports.delivery import RESPONSE_STRENGTHS, ResponseStrengths
from vllm_steer.serving.strength_reports.http_response import Send, StrengthsInResponse, with_length
from vllm_steer.site_report import SiteReport, join_reports

App = Callable[[Message, Receive, Send], Awaitable[None]]

_THREAD_BYTES: Final = 1 << 20
"""Bytes; a larger body is joined and parsed in a thread."""


class SteerMiddleware:
    """The middleware that vLLM adds outermost; it inserts ``Steering`` innermost."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        place_innermost(scope["app"])
        if scope["type"] != "lifespan":
            scope, send = with_header(scope, send)
        if is_change(scope):
            return await answer_change(scope, receive, send)
        if is_scrape(scope):
            await show_slots(scope["app"].state)
        await self._app(scope, receive, send)


def place_innermost(app: Any) -> None:
    """Put ``Steering`` around the routes of a Starlette application, once.

    A router has its own middleware stack, inside that of the application. It is replaced here
    without an ``await``, so concurrent requests see the old or the new stack; no other middleware
    is built again.
    """
    router = app.router
    if not isinstance(router.middleware_stack, Steering):
        router.middleware_stack = Steering(router.middleware_stack)


class Steering:
    """Moves the steer fields of a body to ``vllm_xargs``, which vLLM reads."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._hints: tuple[SteerPlan, SteerHints] | None = None
        self._sites: SiteReport | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        route = route_of(scope)
        if (own := own_route(scope)) is not None:
            return await self._answer(own, scope, receive, send)
        if route is None and not is_form(scope) and not is_realtime(scope):
            return await self._app(scope, receive, send)
        vllm_config = scope[
            "app"
        ].state.vllm_config  # an AttributeError is better than a lost steer
        plan = plan_of(vllm_config)
        if plan is None:
            return await self._app(scope, receive, send)
        header = header_of(scope)
        before = REQUEST_NAMES.set(registry_of(plan).names() if plan.runtime.enabled else None)
        try:
            if route is None:
                header.value = header_value(doses_now(None, plan), plan)
                return await self._pass_other(scope, receive, send, plan, vllm_config)
            await self._pass_body(scope, receive, send, plan, route)
        finally:
            REQUEST_NAMES.reset(before)

    async def _pass_body(
        self, scope: Message, receive: Receive, send: Send, plan: SteerPlan, route: Route
    ) -> None:
        """Pass on a request with a JSON body."""
        body = ReceivedBody(self._hints_of(plan))
        rewritten = Rewrite()
        if await body.receive(receive) and body.may_mention_steer:
            before = body.length
            try:
                rewritten = await _rewrite(body, plan, route, scope["app"].state)
            except BadRequest as refused:
                return await send_bad_request(send, refused, route)
            if body.length != before:
                scope = {**scope, "headers": with_length(scope["headers"], body.length)}
        if not scope["path"].endswith(RENDERS):
            header_of(scope).value = header_value(doses_now(rewritten.steer, plan), plan)
        sent_before = SENT_FIELDS.set(rewritten.fields)
        try:
            await self._pass_on(scope, body.replay(receive), send, rewritten.reports)
        finally:
            SENT_FIELDS.reset(sent_before)

    async def _answer(self, path: str, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request of the plugin's own routes."""
        if path == SITES:
            return await self._answer_sites(scope, send)
        state = scope["app"].state
        plan = plan_of(state.vllm_config)
        if plan is None or (path == PAGE and not plan.playground):
            return await self._app(scope, receive, send)
        if path == STEERS:
            return await send_json(send, await listed_steers(plan, state))
        await send_page(send)

    async def _answer_sites(self, scope: Message, send: Send) -> None:
        """What the self-test found at start-up; the engine is asked once."""
        if self._sites is None:
            engine_client = scope["app"].state.engine_client
            self._sites = join_reports(await engine_client.collective_rpc("steer_sites"))
        answer = {"object": "steer_sites", "sites": self._sites}
        await send_json(send, answer)

    async def _pass_other(
        self, scope: Message, receive: Receive, send: Send, plan: SteerPlan, vllm_config: Any
    ) -> None:
        """Pass on a websocket or a form."""
        if is_realtime(scope):
            checked = without_steers(receive, send, plan, self._hints_of(plan))
            return await self._app(scope, checked, send)
        boundary = boundary_of(scope)
        if boundary is None:
            return await self._app(scope, receive, send)
        await pass_form(self._app, scope, receive, send, FormCheck(boundary, plan, vllm_config))

    async def _pass_on(self, scope: Message, receive: Receive, send: Send, reports: bool) -> None:
        if not reports:
            return await self._app(scope, receive, send)
        delivered = ResponseStrengths()
        before = RESPONSE_STRENGTHS.set(delivered)
        try:
            await self._app(scope, receive, StrengthsInResponse(send, delivered))
        finally:
            RESPONSE_STRENGTHS.reset(before)

    def _hints_of(self, plan: SteerPlan) -> SteerHints:
        if self._hints is None or self._hints[0] is not plan:
            self._hints = plan, SteerHints(plan.presets)
        return self._hints[1]


async def _rewrite(body: ReceivedBody, plan: SteerPlan, route: Route, state: Any) -> Rewrite:
    """Append the steering arguments to the body; returns the rewrite that was made."""
    large = body.length > _THREAD_BYTES
    parsed = await asyncio.to_thread(_parse, body) if large else _parse(body)
    members, text = parsed
    if members is None:
        return Rewrite()
    if members.get(FILES, NULL) != NULL:
        await _take_files(members, plan, route, state)
        text = without_files(body.whole() if text is None else text, members)
        body.replace(text)
    try:
        rewritten = rewrite(members, plan, route, state.vllm_config)
    except UnicodeDecodeError:  # vLLM answers this body with an error
        return Rewrite()
    if rewritten.members:
        body.append(rewritten.members, to=text)
    return rewritten


async def _take_files(members: Members, plan: SteerPlan, route: Route, state: Any) -> None:
    """Load the steers that a body brings, for this request."""
    if not route.passes_vllm_xargs:
        raise BadRequest(f"{FILES}: this route does not support steering; remove it", FILES)
    if not plan.runtime.enabled:
        raise BadRequest(
            f"{FILES}: this server loads no steers; set runtime: {{enabled: true}} in its steer "
            "config",
            FILES,
        )
    steer = steer_value(members, plan)
    steers = await steers_of_body(members, steer, loading_of(state.engine_client))
    names = REQUEST_NAMES.get()
    assert names is not None
    REQUEST_NAMES.set(names.with_steers(steers))


def _parse(body: ReceivedBody) -> ParsedBody:
    """The relevant members of the body; None if it is not a JSON object."""
    text = body.whole()
    try:
        return ParsedBody(BODY.read_fast(text))
    except MsgspecRefused:
        return BODY.read_slowly(text)
