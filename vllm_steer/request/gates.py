"""Reads the option ``when``: the conditions that decide whether a steer acts in the answer."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Protocol

from vllm_steer.doses import Dose, Gate, Needs, TokenWindows
from vllm_steer.errors import SteerRequestError
from vllm_steer.request.parsing import parse
from vllm_steer.request.values import key_name
from vllm_steer.steers.layers import format_layers
from vllm_steer.steers.sites import LAYER_SITES, acts_at_head
from vllm_steer.untrusted_text import listed, shown

CONDITION: Final = "condition"
"""The kind of steers that ``when`` may name."""
MOST_CONDITIONS: Final = 4
_ALLOWED: Final = (
    'a condition\'s name, {"any": [names]} or {"all": [names]} of up to '
    f"{MOST_CONDITIONS} conditions"
)


class SteerPlace(Protocol):
    """Attributes needed to check a gate; ``Steer`` and ``PlannedSteer`` both have them."""

    @property
    def kind(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...


def read_gate(name: str, value: Any) -> Gate | None:
    """A gate, None for no value. Raises ``SteerRequestError`` for any other value."""
    if value is None:
        return None
    if isinstance(value, str):
        return Gate((value,))
    if not isinstance(value, Mapping) or len(value) != 1:
        raise SteerRequestError(f"steer {name} has when {shown(value)}; allowed: {_ALLOWED}")
    ((needs, conditions),) = value.items()
    if needs not in ("any", "all") or not isinstance(conditions, list | tuple):
        raise SteerRequestError(f"steer {name} has when {shown(value)}; allowed: {_ALLOWED}")
    names = tuple(map(key_name, conditions))
    if not 1 <= len(names) <= MOST_CONDITIONS or len(set(names)) < len(names):
        raise SteerRequestError(
            f"steer {name} has when {shown(value)} with {len(names)} conditions; allowed: "
            f"1 to {MOST_CONDITIONS}, each once"
        )
    joined: Needs = "all" if needs == "all" else "any"
    return Gate(names, joined if len(names) > 1 else "any")


def names_in(value: Any) -> frozenset[str]:
    """The steers that a ``steer`` value names, and the conditions in their ``when``.

    Raises ``SteerRequestError`` for a value that is none; a ``when`` that is wrong names nothing.
    """
    names = set[str]()
    for name, options in parse(value):
        names.add(name)
        with suppress(SteerRequestError):
            gate = read_gate(name, options.get("when"))
            names.update(() if gate is None else gate.conditions)
    return frozenset(names)


def with_keys(dose: Dose, steers: Mapping[str, Any]) -> Dose:
    """The dose with the keys of itself and of its conditions, where they were loaded."""
    if dose.gate is None:
        gate = None
    else:
        keys = ((name, getattr(steers[name], "key", None)) for name in dose.gate.conditions)
        loaded = tuple((name, key) for name, key in keys if key is not None)
        gate = replace(dose.gate, keys=loaded)
    return replace(dose, gate=gate, key=getattr(steers[dose.steer], "key", None))


def check_gate_phase(name: str, dose: Dose) -> None:
    """Raise ``SteerRequestError`` for a gated dose that would act on the prompt."""
    if isinstance(dose.phase, TokenWindows):
        acts_on_prompt = bool(dose.phase.prompt)
    else:
        acts_on_prompt = dose.phase not in ("answer", "generation")
    if acts_on_prompt:
        raise SteerRequestError(
            f"steer {name} has 'when' and a phase with tokens of the prompt: a condition decides "
            "about the answer; allowed: answer (the default), generation, windows of the answer"
        )


def check_gate(dose: Dose, steer: SteerPlace, steers: Mapping[str, SteerPlace]) -> None:
    """Raise ``SteerRequestError`` for a gate whose names are no conditions of ``steers``, or whose
    verdict would be known too late for a layer that the dose acts in.
    """
    if dose.gate is None:
        return
    available = [name for name, other in steers.items() if other.kind == CONDITION]
    for name in dose.gate.conditions:
        if name not in available:
            raise SteerRequestError(
                f"steer {dose.steer} has when {shown(name)}, which is no condition; conditions: "
                f"{listed(sorted(available), none='none')}"
            )
        if not acts_at_head(steer) and _acts_on_last_token(dose):
            _check_order(dose, steer, name, steers[name])


def _acts_on_last_token(dose: Dose) -> bool:
    """Whether a gated dose acts on the prompt's last token, which decides about it."""
    if isinstance(dose.phase, TokenWindows):
        return any(not first for first, _ in dose.phase.answer)
    return dose.phase == "answer"


def _check_order(dose: Dose, steer: SteerPlace, name: str, condition: SteerPlace) -> None:
    assert steer.layers is not None and condition.layers is not None
    (layer,) = condition.layers
    same_layer = LAYER_SITES.index(steer.site) >= LAYER_SITES.index(condition.site)
    first = layer if same_layer else layer + 1
    early = [number for number in dose.layers or steer.layers if number < first]
    if early:
        raise SteerRequestError(
            f"steer {dose.steer} acts in layer {format_layers(early)} and has when {name!r}, which "
            f"is read at {condition.site} of layer {layer}, too late for the first token of the "
            f"answer; choose layers from {first} on, or phase generation"
        )
