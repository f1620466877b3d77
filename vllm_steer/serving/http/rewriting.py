"""Finds the steer fields of a body, and makes the members that vLLM needs."""

import json
from typing import Any, Final, NamedTuple

from vllm_steer.doses import is_dynamic
from vllm_steer.errors import SteerRequestError
from vllm_steer.foreign import shown
from vllm_steer.plan import SteerPlan
from vllm_steer.request.ceilings import LONGEST, too_long
from vllm_steer.request.parsing import ALLOWED
from vllm_steer.serving.dynamic_admission import check_engine_for
from vllm_steer.serving.http.members import NULL, Members, Reader
from vllm_steer.serving.http.near_misses import (
    EXTRA_ARGS,
    HOLDERS,
    MEANT,
    MEANT_INSIDE,
    check_names,
    extra_args_of,
)
from vllm_steer.serving.http.refusal import Refused
from vllm_steer.serving.http.routes import Route
from vllm_steer.serving.request_args import STREAM, STRENGTHS, as_wish, refuse_stream

FIELDS: Final = ("steer", STRENGTHS)
ARGUMENTS: Final = "vllm_xargs"
BEAMS: Final = "use_beam_search"
BODY: Final = Reader((*FIELDS, ARGUMENTS, "model", BEAMS, *MEANT, *HOLDERS))
_INSIDE: Final = Reader((*FIELDS, STREAM, *MEANT_INSIDE))
_PYDANTIC_YES: Final = (True, 1, "1", "true", "on", "t", "y", "yes")
_LONGEST_RAW: Final = 12 * LONGEST + 2
"""Bytes of a text's JSON: a character is two escapes at most."""
_LONGEST_WORD: Final = 1000
_LONGEST_MODEL: Final = 1 << 16
"""Bytes of a model's name: a served one is an argument of the server's command line."""


class Rewrite(NamedTuple):
    """Members to append to a body, and whether the response tells the strengths."""

    members: bytes = b""
    reports: bool = False


class Asked(NamedTuple):
    """A field as it was given: where, and the bytes of its value."""

    place: str
    raw: bytes


def rewrite(body: Members, plan: SteerPlan, route: Route, vllm_config: Any = None) -> Rewrite:
    """What to append so that ``vllm_xargs`` hold ``steer``, ``steer_strengths`` and the preset.

    ``vllm_config`` is the engine's, where it is known. Raises ``Refused`` for a body that asks for
    what cannot be served, that asks twice or under a wrong name, or on a route that takes no
    ``vllm_xargs``.
    """
    given = body.get(ARGUMENTS, NULL)
    inside = _INSIDE.read(given)
    check_names(body, inside, route)
    if route.has_extra_args:
        _check_extra_args(extra_args_of(body), plan, vllm_config)
    asked = _asked(body, inside, plan)
    if not asked and inside.get(STREAM, NULL) == NULL:
        return Rewrite()
    _check_places(asked, body, inside, route)
    arguments = _checked(asked, body, inside, plan, vllm_config)
    reports = as_wish(arguments.get(STRENGTHS))
    if all(map(_is_in_place, asked, asked.values())):
        return Rewrite(reports=reports)
    return Rewrite(_members(given, arguments, asked), reports)


def _check_extra_args(members: Members, plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``Refused`` for arguments that vLLM takes as they stand and admission would refuse."""
    places = {name: f"{EXTRA_ARGS}.{name}" for name in FIELDS}
    asked = {
        name: Asked(place, members[name])
        for name, place in places.items()
        if members.get(name, NULL) != NULL
    }
    _checked(asked, {}, members, plan, vllm_config)


def preset_of(model: Any, plan: SteerPlan) -> str | None:
    """The preset in a model name ``BASE:preset``, None if it names none."""
    name = model.rpartition(":")[2] if isinstance(model, str) and ":" in model else None
    return name if name in plan.presets else None


def _asked(body: Members, inside: Members, plan: SteerPlan) -> dict[str, Asked]:
    asked = {}
    for name in FIELDS:
        if inside.get(name, NULL) != NULL:
            asked[name] = Asked(f"{ARGUMENTS}.{name}", inside[name])
        if body.get(name, NULL) != NULL:
            asked[name] = Asked(name, body[name])
    preset = preset_of(_word(body.get("model", NULL), _LONGEST_MODEL), plan)
    if preset is not None and "steer" not in asked:
        asked["steer"] = Asked("model", json.dumps(preset).encode())
    return asked


def _is_in_place(name: str, asked: Asked) -> bool:
    """Whether vLLM takes the value as it stands: in ``vllm_xargs``, and no object or boolean."""
    return asked.place == f"{ARGUMENTS}.{name}" and asked.raw[:1] not in (b"{", b"t", b"f")


def _check_places(asked: dict[str, Asked], body: Members, inside: Members, route: Route) -> None:
    """Raise ``Refused`` for fields that are given twice or that the route would lose."""
    places = [each.place for each in asked.values()] or [f"{ARGUMENTS}.{STREAM}"]
    if not route.carries:
        raise Refused(
            "steer: this route cannot carry a steer; remove it and name the base model", places[0]
        )
    for name in FIELDS:
        if name in places and name in inside:
            raise Refused(f"{name} is given both as a field and in {ARGUMENTS}; give it once", name)
    given = body.get(ARGUMENTS, NULL)
    if given != NULL and not given.startswith(b"{"):
        raise Refused(f"{ARGUMENTS} is {_described(given)}; expected an object", ARGUMENTS)


def _checked(
    asked: dict[str, Asked], body: Members, inside: Members, plan: SteerPlan, vllm_config: Any
) -> dict[str, Any]:
    """The values for ``vllm_xargs``. Admission would refuse none of them: vLLM would answer a
    stream with 200 before it asks.
    """
    place = f"{ARGUMENTS}.{STREAM}"
    arguments: dict[str, Any] = {}
    try:
        if inside.get(STREAM, NULL) != NULL:
            refuse_stream()
        if STRENGTHS in asked:
            place = asked[STRENGTHS].place
            arguments[STRENGTHS] = _wish(asked[STRENGTHS].raw)
        if "steer" in asked:
            place = asked["steer"].place
            arguments["steer"] = _steer(asked["steer"].raw)
            _check_steer(arguments["steer"], body, plan, vllm_config)
    except SteerRequestError as error:
        raise Refused(str(error), place) from None
    return arguments


def _check_steer(steer: str, body: Members, plan: SteerPlan, vllm_config: Any) -> None:
    doses = plan.doses(steer)
    if vllm_config is not None and is_dynamic(doses):
        check_engine_for(doses, plan, vllm_config)
    beams = _word(body.get(BEAMS, NULL))
    is_beam_search = (beams.lower() if isinstance(beams, str) else beams) in _PYDANTIC_YES
    if is_beam_search and doses != plan.doses(None):
        raise SteerRequestError(
            "steer: beam search cannot carry a steer; sample instead, or remove the steer"
        )


def _steer(raw: bytes) -> str:
    """The value as a text. vLLM's extra arguments take no nested objects: those travel as JSON."""
    if raw.startswith(b"{"):
        if len(raw) > 4 * LONGEST:
            too_long()
        return raw.decode("utf-8", "surrogatepass")
    if raw.startswith(b'"'):
        if len(raw) > _LONGEST_RAW:
            too_long()
        return str(json.loads(raw))
    raise SteerRequestError(f"steer is {_described(raw)}; allowed: {ALLOWED}")


def _wish(raw: bytes) -> Any:
    """``steer_strengths`` as an argument that vLLM keeps as it is."""
    if len(raw) > _LONGEST_WORD:
        raise SteerRequestError(f"{STRENGTHS} is {_described(raw)}; expected true or false")
    value = _word(raw)
    as_wish(value)
    return str(value).lower() if isinstance(value, bool) else value


def _members(given: bytes, arguments: dict[str, Any], asked: dict[str, Asked]) -> bytes:
    """The new members: ``vllm_xargs`` with the arguments behind its own, and no fields."""
    own = b"" if given == NULL else given[1:-1].strip()
    ours = json.dumps(arguments).encode()
    written = b"{" + own + b", " + ours[1:] if own else ours
    places = {each.place for each in asked.values()}
    fields = b"".join(b', "%s": null' % name.encode() for name in FIELDS if name in places)
    return fields + b', "%s": ' % ARGUMENTS.encode() + written


def _word(raw: bytes, longest: int = _LONGEST_WORD) -> Any:
    """A short value; None for one that is longer than any word, or deeper."""
    try:
        return json.loads(raw) if len(raw) <= longest else None
    except RecursionError:
        return None


def _described(raw: bytes) -> str:
    """A value for a message: as it is, or its kind and its size."""
    if len(raw) <= _LONGEST_WORD:
        return shown(_word(raw))
    kind = {b"[": "a list", b"{": "an object", b'"': "a string"}.get(raw[:1], "a number")
    return f"{kind} of {len(raw)} characters"
