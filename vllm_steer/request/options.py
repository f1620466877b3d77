"""Reads one steer's options of a request as a dose."""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from vllm_steer.config import DYNAMIC
from vllm_steer.doses import Dose, Phase, TokenWindows, token_spans
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.request.bounds import read_bounds
from vllm_steer.request.dynamic import DYNAMIC_OPTIONS, read_dynamic, requests_dynamic
from vllm_steer.request.gates import CONDITION, check_gate_phase, read_gate
from vllm_steer.request.parsing import options_of
from vllm_steer.request.phases import read_phase
from vllm_steer.request.values import choice, key_name, number
from vllm_steer.steers.layers import parse_layers, positions_of
from vllm_steer.steers.schedules import SCHEDULES, Schedule
from vllm_steer.steers.sites import acts_at_head
from vllm_steer.untrusted_text import listed

_LONG_PROMPT: Final = 2**40
_OPTIONS = ("strength", "layers", "phase", "schedule", "low", "high", "when", *DYNAMIC_OPTIONS)


class SteerAttributes(Protocol):
    """Attributes needed to validate a dose; ``Steer`` and ``PlannedSteer`` both have them."""

    @property
    def kind(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def schedule(self) -> Schedule | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def default_strength(self) -> float | None: ...


def read_dose(name: str, value: Any, steer: SteerAttributes) -> Dose:
    """One steer's dose from a strength, from its options, or from None for its default strength.

    Raises ``SteerRequestError`` for an option that is unknown or that the steer does not have.
    """
    if steer.kind == CONDITION:
        raise SteerRequestError(
            f"steer {name} is a condition, which changes nothing by itself: name it in 'when' of "
            f'a steer, such as {{"refuse": {{"strength": 4, "when": "{name}"}}}}'
        )
    options = {} if value is None else options_of(name, value)
    _check_options(name, options, steer)
    layers = _layers(name, options.get("layers"), steer)
    gate = read_gate(name, options.get("when"))
    low, high = read_bounds(name, options, steer)
    if requests_dynamic(name, options):
        if gate is not None:
            raise SteerRequestError(
                f"steer {name} has 'when' and a dynamic strength, which is computed for a steer "
                "that acts whatever the prompt is; drop one"
            )
        maximum, dynamic = read_dynamic(name, options)
        phase: Phase | TokenWindows = "all" if acts_at_head(steer) else "answer"
        return Dose(name, maximum, layers, phase, dynamic=dynamic, low=low, high=high)
    default = 1.0 if steer.default_strength is None else steer.default_strength
    dose = Dose(
        steer=name,
        strength=read_strength(name, options.get("strength", default)),
        layers=layers,
        phase=read_phase(name, options.get("phase"), _default_phase(steer, gate is not None)),
        schedule=_schedule(name, options.get("schedule"), steer),
        low=low,
        high=high,
        gate=gate,
    )
    if gate is not None and not acts_at_head(steer):
        check_gate_phase(name, dose)
    if dose.phase == "generation" and (dose.schedule == "start" or steer.steps == 1):
        raise SteerRequestError(
            f"steer {name}: with schedule 'start' or a single step it acts at the last prompt "
            "token only, in phase 'generation' after it: together they do nothing; drop one"
        )
    if steer.steps is not None and not token_spans(dose, steer.steps, _LONG_PROMPT):
        raise SteerRequestError(
            f"steer {name}: its phase has no token at which the steps of its delta act: together "
            "they do nothing; drop one"
        )
    return dose


def _default_phase(steer: SteerAttributes, is_gated: bool) -> Phase:
    return "answer" if is_gated and not acts_at_head(steer) else "all"


def read_strength(name: str, value: Any) -> float:
    """A strength that is a number."""
    return number(name, "strength", value, expected=f"such as {name}:1.5, or 'dynamic'")


def _check_options(name: str, options: Mapping[Any, Any], steer: SteerAttributes) -> None:
    unknown = sorted(set(map(key_name, options)) - set(_OPTIONS))
    if unknown:
        raise SteerRequestError(
            f"steer {name} has unknown options {listed(unknown)}; allowed: {', '.join(_OPTIONS)}"
        )
    if acts_at_head(steer) and (
        {"layers", "schedule"} & set(options) or options.get("phase") not in (None, "all")
    ):
        raise SteerRequestError(
            f"steer {name} acts at the LM head: it has no layers, no schedule and no phase but "
            "'all'; give it a strength only"
        )
    if options.get("schedule") == DYNAMIC:
        _check_has_schedule(name, steer, "ask for strength 'dynamic' instead")


def _layers(name: str, value: Any, steer: SteerAttributes) -> tuple[int, ...] | None:
    """The requested layers; None for all layers of the steer."""
    if value is None or steer.layers is None:
        return None
    if getattr(steer, "where_present", False):
        raise SteerRequestError(
            f"steer {name} acts in those of its layers that have its site ('layers: all' in the "
            "steer config): a request cannot choose among them; drop layers"
        )
    try:
        layers = parse_layers(value)
        positions_of(layers, steer.layers)
    except SteerError as error:
        raise SteerRequestError(f"steer {name}: {error}") from None
    return None if layers == tuple(steer.layers) else layers


def _schedule(name: str, value: Any, steer: SteerAttributes) -> Schedule | None:
    if value is None:
        return steer.schedule
    _check_has_schedule(name, steer)
    return choice(name, "schedule", value, SCHEDULES)


def _check_has_schedule(name: str, steer: SteerAttributes, advice: str = "drop it") -> None:
    if steer.schedule is None:
        raise SteerRequestError(
            f"steer {name} is of kind {steer.kind}: only a delta steer has a schedule; {advice}"
        )
