"""Finds the steer fields of a body and makes the JSON members that vLLM reads."""

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vllm_steer.doses import is_dynamic
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.request.parsing import ALLOWED
from vllm_steer.request.value_limits import MAX_CHARACTERS, too_long
from vllm_steer.serving.dynamic_admission import check_engine_for
from vllm_steer.serving.http.bad_request import BadRequest
from vllm_steer.serving.http.json_members import NULL, MemberReader, Members
from vllm_steer.serving.http.misspelled_fields import (
    ARGUMENT_MISSPELLINGS,
    BODY_MISSPELLINGS,
    CLIENT_ONLY_FIELDS,
    EXTRA_ARGS,
    check_names,
    extra_args_of,
)
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.request_args import STREAM, STRENGTHS, parse_boolean, reject_stream_argument
from vllm_steer.serving.runtime.names import doses_now
from vllm_steer.untrusted_text import shown

FIELDS: Final = ("steer", STRENGTHS)
FILES: Final = "steer_files"
ARGUMENTS: Final = "vllm_xargs"
BEAM_SEARCH: Final = "use_beam_search"
BODY: Final = MemberReader(
    (*FIELDS, FILES, ARGUMENTS, "model", BEAM_SEARCH, *BODY_MISSPELLINGS, *CLIENT_ONLY_FIELDS)
)
_ARGUMENT_READER: Final = MemberReader((*FIELDS, STREAM, *ARGUMENT_MISSPELLINGS))
_PYDANTIC_TRUE: Final = (True, 1, "1", "true", "on", "t", "y", "yes")
_MAX_JSON_STRING_BYTES: Final = 12 * MAX_CHARACTERS + 2
"""Bytes of a JSON string of ``MAX_CHARACTERS``; a character is at most two escapes."""
_MAX_SHORT_VALUE_BYTES: Final = 1000
_MAX_MODEL_BYTES: Final = 1 << 16
"""Bytes of a model name; a served name is an argument of the server's command line."""


class Rewrite(NamedTuple):
    """Members to append to a body, and whether the response includes the strengths.

    ``fields`` maps each steering argument to the field of the body in which it was sent; ``steer``
    is the request's value, None if it has none.
    """

    members: bytes = b""
    reports: bool = False
    fields: Mapping[str, str] = {}
    steer: str | None = None


class SteerField(NamedTuple):
    """A steering argument: the field in which it was sent, and the bytes of its value."""

    parameter: str
    raw: bytes


def rewrite(body: Members, plan: SteerPlan, route: Route, vllm_config: Any = None) -> Rewrite:
    """Compute the members to append, so that ``vllm_xargs`` has the body's steering arguments.

    ``vllm_config`` is the engine's, if it is known. Raises ``BadRequest`` for arguments that cannot
    be served, that are given twice or under a misspelled name, or on a route without
    ``vllm_xargs``.
    """
    arguments_json = body.get(ARGUMENTS, NULL)
    inside = _ARGUMENT_READER.read(arguments_json)
    check_names(body, inside, route)
    if route.has_extra_args:
        return _rewrite_extra_args(body, inside, plan, vllm_config)
    fields = _steer_fields(body, inside, plan)
    if not fields and inside.get(STREAM, NULL) == NULL:
        return Rewrite()
    _check_carried(fields, body, inside, route)
    arguments = _checked_arguments(fields, body, inside, plan, vllm_config)
    reports = parse_boolean(arguments.get(STRENGTHS))
    sent = {name: field.parameter for name, field in fields.items()}
    if all(map(_is_in_place, fields, fields.values())):
        return Rewrite(reports=reports, fields=sent, steer=arguments.get("steer"))
    members = _new_members(arguments_json, arguments, fields)
    return Rewrite(members, reports, sent, arguments.get("steer"))


def _rewrite_extra_args(
    body: Members, inside: Members, plan: SteerPlan, vllm_config: Any
) -> Rewrite:
    """The rewrite of a body whose ``sampling_params.extra_args`` reach the engine unchanged."""
    for name in (*FIELDS, STREAM):
        if inside.get(name, NULL) != NULL:
            raise BadRequest(
                f"{ARGUMENTS}.{name} is not read on this route; use {name} in the body itself, or "
                f"in {EXTRA_ARGS}",
                f"{ARGUMENTS}.{name}",
            )
    extra_args_json, extra_args = extra_args_of(body)
    fields = _steer_fields(body, extra_args, plan, place=EXTRA_ARGS)
    _check_given_once(fields, extra_args, EXTRA_ARGS)
    arguments = _checked_arguments(fields, body, extra_args, plan, vllm_config, place=EXTRA_ARGS)
    reports = parse_boolean(arguments.get(STRENGTHS))
    sent = {name: field.parameter for name, field in fields.items()}
    moved = {
        name: value
        for name, value in arguments.items()
        if fields[name].parameter != f"{EXTRA_ARGS}.{name}"
    }
    params_json = body.get("sampling_params", NULL)
    if not moved:
        return Rewrite(reports=reports, fields=sent, steer=arguments.get("steer"))
    if params_json == NULL:
        raise BadRequest("sampling_params is missing; expected an object", "sampling_params")
    _check_object("sampling_params", params_json)
    _check_object(EXTRA_ARGS, extra_args_json)
    added = b'"extra_args": ' + _with_members(extra_args_json, json.dumps(moved).encode()[1:-1])
    params = _with_members(params_json, added)
    members = _nulls(fields) + b', "sampling_params": ' + params
    return Rewrite(members, reports, sent, arguments.get("steer"))


def steer_value(body: Members, plan: SteerPlan) -> Any:
    """The ``steer`` value of a body, unchecked; None if it has none or cannot be read."""
    fields = _steer_fields(body, _ARGUMENT_READER.read(body.get(ARGUMENTS, NULL)), plan)
    try:
        return _steer(fields["steer"].raw) if "steer" in fields else None
    except (SteerRequestError, UnicodeDecodeError):
        return None


def preset_of(model: Any, plan: SteerPlan) -> str | None:
    """The preset in a model name ``BASE:preset``; None if there is none."""
    name = model.rpartition(":")[2] if isinstance(model, str) and ":" in model else None
    return name if name in plan.presets else None


def _steer_fields(
    body: Members, inside: Members, plan: SteerPlan, *, place: str = ARGUMENTS
) -> dict[str, SteerField]:
    fields = {}
    for name in FIELDS:
        if inside.get(name, NULL) != NULL:
            fields[name] = SteerField(f"{place}.{name}", inside[name])
        if body.get(name, NULL) != NULL:
            fields[name] = SteerField(name, body[name])
    preset = preset_of(_short_value(body.get("model", NULL), _MAX_MODEL_BYTES), plan)
    if preset is not None and "steer" not in fields:
        fields["steer"] = SteerField("model", json.dumps(preset).encode())
    return fields


def _is_in_place(name: str, field: SteerField) -> bool:
    """True if vLLM accepts the value unchanged: in ``vllm_xargs``, not an object or a boolean."""
    return field.parameter == f"{ARGUMENTS}.{name}" and field.raw[:1] not in (b"{", b"t", b"f")


def _check_carried(
    fields: dict[str, SteerField], body: Members, inside: Members, route: Route
) -> None:
    """Raise ``BadRequest`` for fields that are given twice or that the route ignores."""
    parameters = [field.parameter for field in fields.values()] or [f"{ARGUMENTS}.{STREAM}"]
    if not route.passes_vllm_xargs:
        raise BadRequest(
            "steer: this route does not support steering; remove the steer and name the base model",
            parameters[0],
        )
    _check_given_once(fields, inside, ARGUMENTS)
    _check_object(ARGUMENTS, body.get(ARGUMENTS, NULL))


def _check_given_once(fields: dict[str, SteerField], inside: Members, place: str) -> None:
    for name, field in fields.items():
        if field.parameter == name and inside.get(name, NULL) != NULL:
            raise BadRequest(f"{name} is given both as a field and in {place}; give it once", name)


def _check_object(name: str, text: bytes) -> None:
    if text != NULL and not text.startswith(b"{"):
        raise BadRequest(f"{name} is {_described(text)}; expected an object", name)


def _checked_arguments(
    fields: dict[str, SteerField],
    body: Members,
    inside: Members,
    plan: SteerPlan,
    vllm_config: Any,
    *,
    place: str = ARGUMENTS,
) -> dict[str, Any]:
    """The values for ``vllm_xargs``, checked as admission does.

    A streaming response starts with status 200 before admission, so errors are raised here.
    """
    parameter = f"{place}.{STREAM}"
    arguments: dict[str, Any] = {}
    try:
        if inside.get(STREAM, NULL) != NULL:
            reject_stream_argument()
        if STRENGTHS in fields:
            parameter = fields[STRENGTHS].parameter
            arguments[STRENGTHS] = _strengths_argument(fields[STRENGTHS].raw)
        if "steer" in fields:
            parameter = fields["steer"].parameter
            arguments["steer"] = _steer(fields["steer"].raw)
            _check_steer(arguments["steer"], body, plan, vllm_config)
    except SteerRequestError as error:
        raise BadRequest(str(error), parameter) from None
    return arguments


def _check_steer(steer: str, body: Members, plan: SteerPlan, vllm_config: Any) -> None:
    doses = doses_now(steer, plan)
    if vllm_config is not None and is_dynamic(doses):
        check_engine_for(doses, plan, vllm_config)
    beams = _short_value(body.get(BEAM_SEARCH, NULL))
    is_beam_search = (beams.lower() if isinstance(beams, str) else beams) in _PYDANTIC_TRUE
    if is_beam_search and doses != doses_now(None, plan):
        raise SteerRequestError(
            "steer: beam search does not support steering; use sampling, or remove the steer"
        )


def _steer(raw: bytes) -> str:
    """The value as a string; objects become JSON, as ``vllm_xargs`` take no nested objects."""
    if raw.startswith(b"{"):
        if len(raw) > 4 * MAX_CHARACTERS:
            too_long()
        return raw.decode("utf-8", "surrogatepass")
    if raw.startswith(b'"'):
        if len(raw) > _MAX_JSON_STRING_BYTES:
            too_long()
        return str(json.loads(raw))
    raise SteerRequestError(f"steer is {_described(raw)}; allowed: {ALLOWED}")


def _strengths_argument(raw: bytes) -> Any:
    """``steer_strengths`` as a value that vLLM does not convert."""
    if len(raw) > _MAX_SHORT_VALUE_BYTES:
        raise SteerRequestError(f"{STRENGTHS} is {_described(raw)}; expected true or false")
    value = _short_value(raw)
    parse_boolean(value)
    return str(value).lower() if isinstance(value, bool) else value


def _new_members(
    arguments_json: bytes, arguments: dict[str, Any], fields: dict[str, SteerField]
) -> bytes:
    """The new members: ``vllm_xargs`` with the arguments added, and null for the moved fields."""
    written = _with_members(arguments_json, json.dumps(arguments).encode()[1:-1])
    return _nulls(fields) + b', "%s": ' % ARGUMENTS.encode() + written


def _with_members(text: bytes, members: bytes) -> bytes:
    """A JSON object, or null, with further members; the last member of a name counts."""
    existing = b"" if text == NULL else text[1:-1].strip()
    return b"{" + existing + (b", " if existing else b"") + members + b"}"


def _nulls(fields: dict[str, SteerField]) -> bytes:
    """Null for each field that was moved out of the body."""
    parameters = {field.parameter for field in fields.values()}
    return b"".join(b', "%s": null' % name.encode() for name in FIELDS if name in parameters)


def _short_value(raw: bytes, longest: int = _MAX_SHORT_VALUE_BYTES) -> Any:
    """Parse a short value; None for one that is too long or too deep."""
    try:
        return json.loads(raw) if len(raw) <= longest else None
    except RecursionError:
        return None


def _described(raw: bytes) -> str:
    """A value for an error message: the value if it is short, else its type and size."""
    if len(raw) <= _MAX_SHORT_VALUE_BYTES:
        return shown(_short_value(raw))
    kind = {b"[": "a list", b"{": "an object", b'"': "a string"}.get(raw[:1], "a number")
    return f"{kind} of {len(raw)} characters"
