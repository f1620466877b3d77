"""Steers a Hugging Face model with forward hooks; the reference for parity with vLLM."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from vllm_steer.doses import Dose
from vllm_steer.errors import SteerError
from vllm_steer.hf.conditions import Gates
from vllm_steer.hf.head import change, hook_head
from vllm_steer.hf.layers import hook_layers
from vllm_steer.hf.token_positions import PositionTracker, SteppedDose
from vllm_steer.request import read_dose
from vllm_steer.request.gates import check_gate
from vllm_steer.steers import ConditionSteer, LMSteer, Steer

__all__ = ["change", "steered"]


@contextmanager
def steered(
    model: nn.Module,
    strengths: Mapping[str, float | Mapping[str, Any]],
    steers: Mapping[str, Steer],
    *,
    prompt_length: int | None = None,
    placeholders: Iterable[int] | None = None,
) -> Iterator[nn.Module]:
    """Steer every forward pass of ``model`` within the ``with`` block, including ``generate``.

    ``strengths`` maps names in ``steers`` to a strength or to options as in a request,
    ``{"strength": 8, "layers": "20-31", "phase": "generation", "schedule": "start"}``, the same for
    all rows of a batch. A list of numbers, ``{"strength": [1.2, 0.8]}``, gives the strength of each
    generation step, beginning at the last prompt token (the format in which dynamic strengths are
    reported); other tokens are not steered, and phase and schedule are not allowed with it. All
    doses at one site of one layer read the same ``x`` and are summed; a token with a rotating dose
    keeps its norm:

        x' = x + sum_k a_k c_k(x)       x' = (x + sum_k a_k c_k(x)) |x| / |x + sum_k a_k c_k(x)|

    ``c_k(x)`` is what steer ``k`` adds at strength 1 (``hf.equations``), and ``a_k`` the strength,
    or 0 if phase, schedule or conditions exclude the token (see ``DeltaSteer``). Tokens without a
    dose and doses of strength 0 leave activations bit-identical. Sums are in float32 (float64 for a
    float64 model) and rounded once to the model's dtype. Nested blocks add and rescale one after
    the other. All hooks are removed at the end of the block.

    A condition is a ``ConditionSteer`` in ``steers`` that an option names: ``{"refuse":
    {"strength": 4, "when": "harmful"}}``. It is read before the steers of its own site and layer,
    in the forward passes of the prompt, which may be several within the block, and each row of a
    batch has a verdict of its own, which it keeps for the rest of its text. A steer that acts in a
    layer before the condition's, in phase ``generation``, needs the prompt in a pass of its own
    before the answer. A gated LM-Steer acts from the prompt's last token on.

    Phases and schedules count from the prompt length ``P``. It is ``prompt_length`` if given
    (teacher forcing: prompt and answer in one forward pass); within ``generate``, the length of its
    input; otherwise the length of the last forward pass with an empty KV cache, so give it for a
    prompt in several passes. Positions include padding: in a left-padded batch, the padding is part
    of the prompt, for a condition on ``any`` of its tokens too.

    Phase ``text`` leaves out the tokens that stand for images, audio or video: those at the
    positions ``placeholders``, or the prompt's tokens with the ids that the model's config has for
    them (``image_token_id`` and the like), at the same positions in all rows of a batch.

    Raises ``SteerError`` for an unknown name, options that are invalid in a request, a model of
    unknown architecture or without the LM head, layer or site of a steer, and a steer of another
    width, and for a condition that is read too late. The forward pass raises it if the prompt
    length is unknown, for phase ``text`` if the placeholders are, and for a condition that was not
    read for all of the batch's rows.

    Sources: those of the kinds of steers.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from vllm_steer import VectorSteer, hf
    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> calm = VectorSteer(vectors=torch.ones(1, 8), layers=(0,))
    >>> with hf.steered(model, {"calm": 4.0}, {"calm": calm}), torch.no_grad():
    ...     steered = model(torch.tensor([[1, 2, 3]])).logits
    >>> bool((steered == model(torch.tensor([[1, 2, 3]])).logits).all())
    False
    """
    doses = _read_doses(strengths, steers)
    conditions = {n: steer for n, steer in steers.items() if isinstance(steer, ConditionSteer)}
    at_head = [(s, dose) for dose, s in doses if isinstance(s, LMSteer)]
    in_layers = [(d, s) for d, s in doses if not isinstance(s, LMSteer | ConditionSteer)]
    tracker = PositionTracker(prompt_length, placeholders)
    gates = Gates.of((dose for dose, _ in doses), conditions, tracker)
    with ExitStack() as hooks:
        for handle in hook_head(model, at_head, gates, tracker):
            hooks.callback(handle.remove)
        is_stepped = any(isinstance(dose, SteppedDose) for dose, _ in doses)
        if in_layers or gates.readers or is_stepped:
            hooks.enter_context(tracker.follow(model))
        if in_layers or gates.readers:
            for handle in hook_layers(model, in_layers, gates, tracker):
                hooks.callback(handle.remove)
        yield model


def _read_doses(
    strengths: Mapping[str, float | Mapping[str, Any]], steers: Mapping[str, Steer]
) -> list[tuple[Dose, Steer]]:
    """The doses with non-zero strength, each with its steer."""
    unknown = sorted(set(strengths) - set(steers))
    if unknown:
        raise SteerError(f"steer {', '.join(unknown)} is unknown; steers: {', '.join(steers)}")
    doses = [_read_dose(name, value, steers[name]) for name, value in strengths.items()]
    for dose in doses:
        check_gate(dose, steers[dose.steer], steers)
    return [(dose, steers[dose.steer]) for dose in doses if dose.strength != 0]


def _read_dose(name: str, value: float | Mapping[str, Any], steer: Steer) -> Dose:
    strengths = value.get("strength") if isinstance(value, Mapping) else None
    if not isinstance(strengths, Sequence) or isinstance(strengths, str):
        dose = read_dose(name, value, steer)
        if dose.dynamic is not None:
            raise SteerError(
                f"steer {name}: dynamic strengths are computed by vLLM only; give the "
                "strengths that it reports as a list"
            )
        return dose
    assert isinstance(value, Mapping)
    if not strengths or set(value) & {"phase", "schedule"}:
        raise SteerError(
            f"steer {name}: a list of strengths needs at least one number, one per generation "
            "step, and does not allow phase or schedule"
        )
    for number in strengths:
        read_dose(name, {"strength": number}, steer)
    dose = read_dose(name, {**value, "strength": 1.0}, steer)
    history = tuple(map(float, strengths))
    return SteppedDose(
        name,
        1.0,
        layers=dose.layers,
        phase="answer",
        low=dose.low,
        high=dose.high,
        gate=dose.gate,
        history=history,
    )
