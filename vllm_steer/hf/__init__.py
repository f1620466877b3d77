"""The same steers on a plain Hugging Face model: the reference for parity, useful by itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.hf.head import change, hook_head
from vllm_steer.hf.layers import hook_layers
from vllm_steer.hf.positions import Reading, SteppedDose
from vllm_steer.request import read_dose
from vllm_steer.steers import DeltaSteer, LMSteer, Steer, VectorSteer

__all__ = ["change", "steered"]


@contextmanager
def steered(
    model: nn.Module,
    strengths: Mapping[str, float | Mapping[str, Any]],
    steers: Mapping[str, Steer],
    *,
    prompt_length: int | None = None,
) -> Iterator[nn.Module]:
    """Within the block, every forward pass of ``model`` is steered, ``generate`` included.

    ``strengths`` maps names in ``steers`` to a strength or to options as in a request,
    ``{"strength": 8, "layers": "20-31", "phase": "generation", "schedule": "start"}``, for all rows
    of a batch alike. A list of numbers as the strength, ``{"strength": [1.2, 0.8]}``, is what acts
    at each generation step from the last prompt token on, as dynamic strengths are reported; at
    all other tokens the dose does nothing, and it has no phase and no schedule. At one site of one
    layer all doses add up, ``w_k`` a unit vector where steer ``k`` rotates; a token that a rotating
    dose acts on keeps its norm:

        x' = x + sum_k a_k w_k          x' = (x + sum_k a_k w_k) |x| / |x + sum_k a_k w_k|

    ``a_k`` is the strength, or 0 where the phase or the schedule leaves the token out (see
    ``DeltaSteer``); a token with no dose keeps every bit, and so does everything at strength 0.
    Sums are taken in float32, or in float64 for a float64 model, and rounded once to the model's
    dtype. Of nested blocks each adds and rescales for itself. Nothing stays on the model after.

    The prompt length ``P``, which phases and schedules count from, is ``prompt_length`` where it is
    given (teacher forcing: prompt and answer in one forward pass); within ``generate`` the length
    of what it was given, with a KV cache and without; else the length of the forward pass
    that began the text, which is one with an empty cache. Positions count the tokens of a
    row as they stand: in a batch padded on the left, the padding is part of the prompt.

    Raises ``SteerError`` for an unknown name, options that a request could not have either, a model
    without the LM head, the layer or the site that a steer acts at or of an unknown architecture,
    a steer of another width, and, at the forward pass, a text whose beginning was not seen.
    """
    doses = _read_doses(strengths, steers)
    at_head = [(s, dose) for dose, s in doses if isinstance(s, LMSteer)]
    in_layers = [(d, s) for d, s in doses if isinstance(s, VectorSteer | DeltaSteer)]
    reading = Reading(prompt_length)
    with ExitStack() as hooks:
        for handle in hook_head(model, at_head, reading):
            hooks.callback(handle.remove)
        if in_layers or any(isinstance(dose, SteppedDose) for dose, _ in doses):
            hooks.enter_context(reading.follow(model))
            for handle in hook_layers(model, in_layers, reading):
                hooks.callback(handle.remove)
        yield model


def _read_doses(
    strengths: Mapping[str, float | Mapping[str, Any]], steers: Mapping[str, Steer]
) -> list[tuple[Dose, Steer]]:
    """The doses of a strength other than 0, each with its steer."""
    unknown = sorted(set(strengths) - set(steers))
    if unknown:
        raise SteerError(f"steer {', '.join(unknown)} is unknown; steers: {', '.join(steers)}")
    doses = [_read_dose(name, given, steers[name]) for name, given in strengths.items()]
    return [(dose, steers[dose.steer]) for dose in doses if dose.strength != 0]


def _read_dose(name: str, given: float | Mapping[str, Any], steer: Steer) -> Dose:
    listed = given.get("strength") if isinstance(given, Mapping) else None
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        dose = read_dose(name, given, steer)
        if dose.dynamic is not None:
            raise SteerError(
                f"steer {name}: a dynamic strength is computed as vLLM serves; here, give the "
                "strengths that it reports as a list"
            )
        return dose
    assert isinstance(given, Mapping)
    if not listed or set(given) & {"phase", "schedule"}:
        raise SteerError(
            f"steer {name}: a list of strengths has one for each step from the last prompt token "
            "on, at least one, and goes with no phase and no schedule"
        )
    for number in listed:
        read_dose(name, {"strength": number}, steer)
    dose = read_dose(name, {**given, "strength": 1.0}, steer)
    history = tuple(map(float, listed))
    return SteppedDose(name, 1.0, layers=dose.layers, phase="answer", history=history)
