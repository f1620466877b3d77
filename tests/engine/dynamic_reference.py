"""Dynamic strengths with Hugging Face: every stream is its own forward pass, without a cache.

A request of ``n`` dynamic doses is ``n + 2`` streams of one text: a base that is never steered, a
probe for each dose, which is steered only by that dose at its maximum from position ``P - 1`` on,
and the main stream, in which dose ``j`` has strength ``a_ij`` at position ``P - 1 + i``:

    Q    = top(p0) | top(pj), the likeliest tokens up to and with the one that crosses top_p
    KL   = sum_{v in Q} P0(v) (ln P0(v) - ln Pj(v)), P0 and Pj renormalised over Q
    a_ij = sign(max) min(max(KL, 0), |max|), with KL / |Q| for KL if the dose says so

where ``p0`` and ``pj`` choose token ``i``. Fixed doses act in the main stream alone, and a delta
past its last step does nothing. It all runs in the dtype of the model, float32 or float64.

The reference uses nothing of the project except the steers and doses as data.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from reference import MODULES

from vllm_steer import DeltaSteer, LMSteer, Steer, VectorSteer
from vllm_steer.doses import Dose


@dataclass(frozen=True)
class Trace:
    """The generated text of a request and the strength of each step.

    tokens      the tokens, chosen or given
    strengths   per dynamic dose, one number a step
    logprobs    ``[steps, V]`` of the main stream
    margins     per step, the first choice's logprob less the second's
    boundaries  per dynamic dose and step, how much probability separates its ``Q`` from another one
    """

    tokens: list[int]
    strengths: dict[str, list[float]]
    logprobs: torch.Tensor
    margins: list[float]
    boundaries: dict[str, list[float]]

    @property
    def choices(self) -> list[int]:
        """The greedy choice of each step, also for a forced text."""
        return [int(token) for token in self.logprobs.argmax(-1)]


class Take(NamedTuple):
    """A steer in one stream, with the strength of each position (0: not steered)."""

    steer: Steer
    layers: tuple[int, ...] | None
    strengths: torch.Tensor


@torch.no_grad()
def reference_generate(
    model: Any,
    prompt_ids: Sequence[int],
    doses: Sequence[Dose],
    steers: Mapping[str, Steer],
    *,
    max_tokens: int = 16,
    eos: int | None = None,
    forced: Sequence[int] | None = None,
    history: Mapping[str, Sequence[float]] | None = None,
) -> Trace:
    """The trace of a request with greedy tokens, or with the tokens ``forced``.

    An ``eos`` ends the text and is its last token. The main stream uses the strengths of
    ``history`` for the doses in it.
    """
    prompt = [int(token) for token in prompt_ids]
    if forced is not None:
        return _trace(model, prompt, [int(token) for token in forced], doses, steers, history)
    tokens: list[int] = []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != eos):
        tokens.append(_trace(model, prompt, [*tokens, 0], doses, steers).choices[-1])
    return _trace(model, prompt, tokens, doses, steers)


def _trace(
    model: Any,
    prompt: list[int],
    tokens: list[int],
    doses: Sequence[Dose],
    steers: Mapping[str, Steer],
    history: Mapping[str, Sequence[float]] | None = None,
) -> Trace:
    """All steps of a text at once: no position sees a later one."""
    ids, first = [*prompt, *tokens[:-1]], len(prompt) - 1
    base = _hidden_states(model, ids, [], first)
    base_logits = _logits(model, base, [])
    takes, strengths, boundaries = [], {}, {}
    for dose in doses:
        steer = steers[dose.steer]
        if dose.dynamic is None:
            takes.append(Take(steer, dose.layers, _fixed(dose, steer, len(ids), first)))
            continue
        probe = _logits_of_probe(model, ids, base, dose, steer, first)
        result = _strengths(base_logits[first:], probe[first:], dose, steer)
        along = torch.zeros(len(ids), dtype=base.dtype)
        along[first:] = torch.as_tensor((history or {}).get(dose.steer, result[0]))
        takes.append(Take(steer, dose.layers, along))
        strengths[dose.steer] = result[0].tolist()
        boundaries[dose.steer] = result[1]
    main = _logits(model, _hidden_states(model, ids, takes, first), takes)[first:]
    logprobs = main.log_softmax(-1)
    best = logprobs.topk(2, dim=-1).values
    return Trace(tokens, strengths, logprobs, (best[:, 0] - best[:, 1]).tolist(), boundaries)


def _logits_of_probe(
    model: Any, ids: list[int], base: torch.Tensor, dose: Dose, steer: Steer, first: int
) -> torch.Tensor:
    """The stream of one dose alone; at the head it has the hidden states of the base."""
    constant = torch.zeros(len(ids), dtype=base.dtype)
    constant[first:] = dose.strength
    take = Take(steer, dose.layers, constant)
    hidden = base if isinstance(steer, LMSteer) else _hidden_states(model, ids, [take], first)
    return _logits(model, hidden, [take])


def _strengths(
    base: torch.Tensor, probe: torch.Tensor, dose: Dose, steer: Steer
) -> tuple[torch.Tensor, list[float]]:
    """Strength and boundary of each step."""
    assert dose.dynamic is not None
    strengths, boundaries = torch.zeros(len(base), dtype=base.dtype), []
    for step, (p0, pj) in enumerate(zip(base.softmax(-1), probe.softmax(-1), strict=True)):
        if isinstance(steer, DeltaSteer) and step >= steer.steps:
            boundaries.append(1.0)
            continue
        divergence, boundary = divergence_over_likeliest(
            p0, pj, dose.dynamic.top_p, by_size=dose.dynamic.kl == "authors"
        )
        size = min(max(divergence, 0.0), abs(dose.strength))
        strengths[step] = size if dose.strength > 0 else -size
        boundaries.append(boundary)
    return strengths, boundaries


def divergence_over_likeliest(
    p0: torch.Tensor, pj: torch.Tensor, top_p: float, *, by_size: bool
) -> tuple[float, float]:
    """KL over ``Q`` of two distributions ``[V]``, and the distance of ``Q`` from another one."""
    top0, boundary0 = _likeliest(p0, top_p)
    topj, boundaryj = _likeliest(pj, top_p)
    q = sorted(top0 | topj)
    renormalised0, renormalisedj = p0[q] / p0[q].sum(), pj[q] / pj[q].sum()
    terms = renormalised0 * (renormalised0.log() - renormalisedj.log())
    return float(terms[renormalised0 > 0].sum()) / (len(q) if by_size else 1), min(
        boundary0, boundaryj
    )


def _likeliest(p: torch.Tensor, top_p: float) -> tuple[set[int], float]:
    """Tokens in descending order until their sum exceeds ``top_p``, and the margin of this set.

    The set changes with the sum, or with the order of its last token and the next one.
    """
    falling, order = p.sort(descending=True, stable=True)
    total, count = 0.0, 0
    nearest = 1.0
    while count < len(p) and total <= top_p:
        total += float(falling[count])
        count += 1
        nearest = min(nearest, abs(total - top_p))
    if count < len(p):
        nearest = min(nearest, float(falling[count - 1] - falling[count]))
    return {int(token) for token in order[:count]}, nearest


def _fixed(dose: Dose, steer: Steer, length: int, first: int) -> torch.Tensor:
    """The strength of each position under a fixed dose."""
    along = torch.zeros(length, dtype=torch.float64)
    for position in range(length):
        in_prompt = position <= first
        if dose.phase in ("all", "prompt" if in_prompt else "generation"):
            along[position] = dose.strength
    if isinstance(steer, DeltaSteer):
        schedule = dose.schedule or steer.schedule
        for step in range(length - first):
            if schedule == "start" and step > 0:
                along[first + step] = 0.0
            if schedule == "dim":
                along[first + step] *= 1 - step / steer.steps
    return along


def _hidden_states(model: Any, ids: list[int], takes: Sequence[Take], first: int) -> torch.Tensor:
    """``[L, d]`` before the LM head."""
    by_place: dict[tuple[int, str], list[Take]] = {}
    for take in takes:
        if isinstance(take.steer, LMSteer):
            continue
        for layer in take.steer.layers if take.layers is None else take.layers:
            by_place.setdefault((layer, take.steer.site), []).append(take)
    with ExitStack() as hooks:
        for (layer, site), some in by_place.items():
            hooks.callback(_hook(model, layer, site, some, first).remove)
        output = model.base_model(torch.tensor([ids]), use_cache=False)
    return output.last_hidden_state[0]


def _hook(model: Any, layer: int, site: str, takes: Sequence[Take], first: int) -> Any:
    names = MODULES[type(model).__name__]
    block = model.get_submodule(names.blocks)[layer]

    def steered(value: Any) -> Any:
        if isinstance(value, tuple):
            return (steered(value[0]), *value[1:])
        return _steered(value[0], takes, layer, first)[None]

    if site == "heads":
        projection = block.get_submodule(names.projection)
        return projection.register_forward_pre_hook(lambda _, args: (steered(args[0]),))
    of_site = {"resid": "", "attn_out": names.attention, "attn_in": names.input_norm}
    module = block.get_submodule(of_site[site])
    return module.register_forward_hook(lambda _module, _args, output: steered(output))


def _steered(x: torch.Tensor, takes: Sequence[Take], layer: int, first: int) -> torch.Tensor:
    """``x + sum``, at the old norm where a take with a non-zero strength rotates."""
    moved, rotates = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    for take in takes:
        strengths = take.strengths.to(x.dtype)
        row = take.steer.layers.index(layer)
        if isinstance(take.steer, VectorSteer):
            w = take.steer.vectors[row].to(x.dtype)
            if take.steer.mode == "rotate":
                w = w / w.norm()
                rotates |= strengths != 0
            moved += strengths[:, None] * w
        else:
            for step in range(min(take.steer.steps, len(x) - first)):
                delta = take.steer.delta[step, row].to(x.dtype)
                moved[first + step] += strengths[first + step] * delta
    rescaled = moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    return torch.where(rotates[:, None], rescaled, moved)


def _logits(model: Any, hidden: torch.Tensor, takes: Sequence[Take]) -> torch.Tensor:
    """``[L, V]`` with the steers at the head, each applied to the unsteered hidden states."""
    head = model.get_output_embeddings()
    steered = hidden.clone()
    offset = torch.zeros(len(hidden), head.weight.shape[0], dtype=hidden.dtype)
    for steer, _, along in takes:
        if not isinstance(steer, LMSteer):
            continue
        strengths = along.to(hidden.dtype)[:, None]
        for column in range(steer.columns):
            is_steered = (strengths != 0).to(hidden.dtype)
            scale = steer.epsilon * (is_steered if column in steer.fixed_columns else strengths)
            if steer.variant == "multiply":
                change = hidden @ steer.projector1[column].to(hidden.dtype)
                steered += scale * (change @ steer.projector2[column].to(hidden.dtype).T)
            elif steer.variant == "add":
                steered += scale * steer.add[column].to(hidden.dtype)
            else:
                offset += scale * steer.offset[column].to(hidden.dtype)
    logits = steered @ head.weight.T + offset
    if getattr(head, "bias", None) is not None:
        logits = logits + head.bias
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits / getattr(model.config, "logits_scaling", 1.0)
