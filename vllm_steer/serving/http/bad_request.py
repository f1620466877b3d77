"""Responses to bad requests, in the format of the route's own errors."""

from vllm_steer.serving.http.json_response import send_json
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.strength_reports.http_response import Send
from vllm_steer.untrusted_text import message as shown_message

_TYPE = "BadRequestError"


class BadRequest(ValueError):
    """A body that cannot be served; ``parameter`` is the field at fault."""

    def __init__(self, message: str, parameter: str, status: int = 400) -> None:
        super().__init__(shown_message(message))
        self.parameter = parameter
        self.status = status


async def send_bad_request(send: Send, refused: BadRequest, route: Route) -> None:
    """Send the response."""
    await send_json(send, error_body(refused, route), status=refused.status)


def error_body(refused: BadRequest, route: Route) -> dict[str, object]:
    """The error body in the format of the route: Anthropic's or OpenAI's."""
    message = str(refused)
    if route.is_anthropic:
        return {"type": "error", "error": {"type": _TYPE, "message": message}}
    return {
        "error": {
            "message": message,
            "type": _TYPE,
            "param": refused.parameter,
            "code": refused.status,
        },
    }
