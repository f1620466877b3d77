"""What the independent forward pass adds for steers that read the token, and for conditions.

The equations, each in float64 for one token ``x`` at a time:

    project   v (clip(a, low, high) - a) u      a = x . u, u = w / |w|
    relative  v |x| u
    low_rank  v B (A x + b)
    sae       v d,  v (clip(f, low, high) - f) d,  v f d      f = e . x + bias above the threshold
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_steer import Steer
from vllm_steer.doses import Dose, TokenWindows
from vllm_steer.steers import ConditionSteer, LowRankSteer, SAESteer, VectorSteer


def positions_of(phase: Any, length: int, prompt_length: int) -> list[int]:
    """The positions of a phase or of windows, by Python's own slices."""
    everything = list(range(length))
    answer = everything[prompt_length - 1 :]
    if isinstance(phase, TokenWindows):
        parts = [everything[:prompt_length][slice(*bounds)] for bounds in phase.prompt]
        parts += [answer[slice(*bounds)] for bounds in phase.answer]
        return sorted({position for part in parts for position in part})
    return {
        "all": everything,
        "prompt": everything[:prompt_length],
        "generation": everything[prompt_length:],
        "answer": answer,
        "last": answer[:1],
    }[phase]


def reads(steer: Steer) -> bool:
    """Whether what a steer adds depends on the token."""
    if isinstance(steer, VectorSteer):
        return steer.mode in ("project", "relative")
    return isinstance(steer, LowRankSteer | SAESteer)


def change_of(dose: Dose, steer: Any, row: int, x: torch.Tensor) -> torch.Tensor:
    """What one dose adds to one token ``x [width]``."""
    if isinstance(steer, LowRankSteer):
        bias = 0 if steer.bias is None else steer.bias[row].double()
        return dose.strength * (steer.b[row].double() @ (steer.a[row].double() @ x + bias))
    low = steer.low if dose.low is None else dose.low
    high = steer.high if dose.high is None else dose.high
    if isinstance(steer, SAESteer):
        decoder = steer.decoder[row].double()
        f = float(steer.encoder[row].double() @ x) + float(steer.bias[row])
        f = f if f > float(steer.threshold[row]) else 0.0
        factor = {"add": 1.0, "clamp": min(max(f, low), high) - f, "scale": f}[steer.mode]
        return dose.strength * factor * decoder
    u = steer.vectors[row].double() / steer.vectors[row].double().norm()
    if steer.mode == "relative":
        return dose.strength * x.norm() * u
    a = float(x @ u)
    return dose.strength * (min(max(a, low), high) - a) * u


def holds(condition: ConditionSteer, prompt: torch.Tensor) -> bool:
    """Whether a condition holds for the hidden states ``[tokens, width]`` of a prompt."""
    tokens = prompt[-1:] if condition.tokens == "last" else prompt
    return any(_is_beyond(condition, _similarity(condition, x)) for x in tokens)


def _similarity(condition: ConditionSteer, x: torch.Tensor) -> float:
    w = condition.vector[0].double()
    if condition.similarity == "dot":
        return float(x @ w / w.norm())
    if condition.similarity == "cast":
        w = torch.tanh((torch.outer(w, w) / (w @ w)) @ x)
    return float(torch.nn.functional.cosine_similarity(x, w, dim=0))


def _is_beyond(condition: ConditionSteer, similarity: float) -> bool:
    above = similarity > condition.threshold
    return above if condition.side == "above" else similarity < condition.threshold


def margin(condition: ConditionSteer, prompt: torch.Tensor) -> float:
    """How far the nearest similarity of a tested token is from the threshold."""
    tokens = prompt[-1:] if condition.tokens == "last" else prompt
    return min(abs(_similarity(condition, x) - condition.threshold) for x in tokens)


def open_doses(doses: Sequence[Dose], verdicts: Mapping[str, bool]) -> list[Dose]:
    """The doses whose gates are open under the verdicts; those that are not known are False."""
    joined = {"any": any, "all": all}
    return [
        dose
        for dose in doses
        if dose.gate is None
        or joined[dose.gate.needs](verdicts.get(name, False) for name in dose.gate.conditions)
    ]
