"""Multipart forms, the bodies of the audio routes: a steer is read in ``vllm_xargs`` only.

A form is checked while vLLM receives it: each chunk is parsed once and passed on as it is. Only the
headers of a part, a model name and ``vllm_xargs`` are kept, up to a limit.
"""

from collections.abc import Mapping
from typing import Any, Final

from vllm_steer.plan import SteerPlan
from vllm_steer.serving.http.bad_request import BadRequest, send_bad_request
from vllm_steer.serving.http.body_rewrite import ARGUMENTS, FIELDS, preset_of, rewrite
from vllm_steer.serving.http.misspelled_fields import BODY_MISSPELLINGS
from vllm_steer.serving.http.request_body import Message, Receive
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.request_args import STEER, STRENGTHS
from vllm_steer.serving.strength_reports.http_response import Send
from vllm_steer.untrusted_text import shown

_MAX_BYTES: Final = 1 << 17
"""Bytes of a part's headers, of a model name and of ``vllm_xargs``."""
_ROUTE: Final = Route(passes_vllm_xargs=True)
_REFUSED: Final = {name: name for name in FIELDS} | BODY_MISSPELLINGS
_KEPT: Final = ("model", ARGUMENTS)


class FormCheck:
    """Looks for steer fields in the parts of a form that the routes would ignore."""

    def __init__(self, boundary: bytes, plan: SteerPlan, vllm_config: Any) -> None:
        from python_multipart.multipart import MultipartParser

        self.refused: BadRequest | None = None
        self._plan = plan
        self._vllm_config = vllm_config
        self._headers = bytearray()
        self._name = ""
        self._value: bytearray | None = None
        self._parser: Any = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_to_headers,
                "on_header_value": self._add_to_headers,
                "on_header_end": self._end_header,
                "on_header_begin": self._begin_header,
                "on_part_data": self._add_to_value,
                "on_part_end": self._end,
            },
        )

    def add(self, chunk: bytes) -> None:
        """Parse the next chunk. Raises ``BadRequest`` for a steer field that would be ignored."""
        from python_multipart.exceptions import MultipartParseError

        if self._parser is None:
            return
        try:
            self._parser.write(chunk)
        except MultipartParseError:  # vLLM answers this form with an error
            self._parser = None
        except BadRequest as refused:
            self.refused = refused
            raise

    def _begin(self) -> None:
        self._name, self._value = "", None

    def _begin_header(self) -> None:
        self._headers.clear()

    def _add_to_headers(self, data: bytes, start: int, end: int) -> None:
        if len(self._headers) + end - start > _MAX_BYTES:
            raise BadRequest("a part of the form has a header that is too long", "headers")
        self._headers += data[start:end]

    def _end_header(self) -> None:
        from python_multipart.multipart import parse_options_header

        name = b"content-disposition"
        if self._headers[: len(name)].lower() != name:
            return
        _, parameters = parse_options_header(bytes(self._headers[len(name) :]))
        self._name = parameters.get(b"name", b"").decode("utf-8", "replace")
        self._value = bytearray() if self._name in _KEPT else None
        if self._name in _REFUSED:
            correct = _REFUSED[self._name]
            raise BadRequest(f"{self._name}: {_advice(correct)}", self._name)

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            return
        if len(self._value) + end - start > _MAX_BYTES:
            raise BadRequest(f"{self._name} has over {_MAX_BYTES} bytes", self._name)
        self._value += data[start:end]

    def _end(self) -> None:
        if self._value is None:
            return
        value, self._value = bytes(self._value).strip(), None
        if self._name == ARGUMENTS:
            return self._check_arguments(value)
        model = value.decode("utf-8", "replace")
        if (preset := preset_of(model, self._plan)) is not None:
            raise BadRequest(
                f"model is {shown(model)}: this route takes no preset as a model; name the model "
                f'alone and send {ARGUMENTS}, such as {{"steer": "{preset}"}}',
                "model",
            )

    def _check_arguments(self, value: bytes) -> None:
        if not value.startswith(b"{"):
            return  # vLLM answers it with an error
        rewritten = rewrite({ARGUMENTS: value}, self._plan, _ROUTE, self._vllm_config)
        if rewritten.reports:
            raise BadRequest(
                f"{STRENGTHS}: this route does not report strengths; remove it",
                f"{ARGUMENTS}.{STRENGTHS}",
            )
        if rewritten.members:
            raise BadRequest(
                f"{ARGUMENTS}.{STEER} is an object; this route takes a string, such as "
                '{"steer": "detox:5,humor"}',
                f"{ARGUMENTS}.{STEER}",
            )


def _advice(name: str) -> str:
    if name == STRENGTHS:
        return "this route does not report strengths; remove it"
    return (
        f"this route reads a steer in {ARGUMENTS} only, a form field that is a JSON string such as "
        '{"steer": "detox:5,humor"}'
    )


def boundary_of(scope: Mapping[str, Any]) -> bytes | None:
    """The boundary of a request's multipart form; None if its body is something else."""
    from python_multipart.multipart import parse_options_header

    for name, value in scope["headers"]:
        if name.lower() == b"content-type":
            content_type, parameters = parse_options_header(value)
            is_form = content_type == b"multipart/form-data"
            return parameters.get(b"boundary") if is_form else None
    return None


async def pass_form(
    app: Any, scope: Message, receive: Receive, send: Send, check: FormCheck
) -> None:
    """Run an application whose form is checked as it receives it; answer a refused one."""

    async def checked() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            check.add(message.get("body", b""))
        return message

    async def answer(message: Message) -> None:
        if check.refused is None:  # else it is FastAPI's answer to the exception of ``checked``
            await send(message)

    try:
        await app(scope, checked, answer)
    except BadRequest:
        if check.refused is None:
            raise
    if check.refused is not None:
        await send_bad_request(send, check.refused, _ROUTE)
